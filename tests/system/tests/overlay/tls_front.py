"""TLS in front of a server without: tls_front.py PORT TO KEY CERTIFICATE CA

Who connects to PORT must show a certificate of CA, and is connected to TO.
"""

import socket
import ssl
import sys
import threading

port, to, key, certificate, ca = sys.argv[1:]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(certificate, key)
context.load_verify_locations(ca)
context.verify_mode = ssl.CERT_REQUIRED


def copy(a, b):
    try:
        while data := a.recv(65536):
            b.sendall(data)
    except OSError:
        pass
    for end in (a, b):
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


def serve(client):
    try:
        outer = context.wrap_socket(client, server_side=True)
        inner = socket.create_connection(("127.0.0.1", int(to)))
    except OSError:
        client.close()
        return
    threading.Thread(target=copy, args=(inner, outer), daemon=True).start()
    copy(outer, inner)


server = socket.create_server(("127.0.0.1", int(port)))
while True:
    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
