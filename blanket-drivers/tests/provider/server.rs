//! A metadata service on the loopback, which may behave badly.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Nobody waits for longer; what does is a test that fails.
const LONG: Duration = Duration::from_secs(60);

/// What was asked.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) path: String,
    headers: Vec<(String, String)>,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let same = |(key, _): &&(String, String)| key.eq_ignore_ascii_case(name);
        self.headers
            .iter()
            .find(same)
            .map(|(_, value)| value.as_str())
    }
}

/// What is done about it.
pub(crate) enum Reply {
    /// Status, headers and body.
    Answer(u16, Vec<(&'static str, String)>, Vec<u8>),
    /// These bytes, whatever they are.
    Raw(&'static [u8]),
    /// These bytes, and no more until the client leaves.
    Hang(&'static [u8]),
    /// The first bytes, then the others again and again until the client leaves.
    Endless(&'static [u8], &'static [u8]),
}

pub(crate) fn ok(body: &str) -> Reply {
    Reply::Answer(200, Vec::new(), body.into())
}

pub(crate) fn status(status: u16) -> Reply {
    Reply::Answer(status, Vec::new(), Vec::new())
}

pub(crate) type Handler = fn(&Request) -> Reply;

pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    state: Arc<State>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct State {
    asked: Mutex<Vec<Request>>,
    sent: AtomicU64,
    over: AtomicBool,
}

impl Server {
    pub(crate) fn start(handler: Handler) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State::default());
        let shared = state.clone();
        let thread = thread::spawn(move || {
            for stream in listener.incoming() {
                if shared.over.load(Ordering::SeqCst) {
                    return;
                }
                let (stream, state) = (stream.unwrap(), shared.clone());
                // It ends when the client leaves.
                thread::spawn(move || serve(stream, handler, &state));
            }
        });
        Self {
            address,
            state,
            thread: Some(thread),
        }
    }

    /// What was asked so far, as `METHOD path`, in order of the alphabet.
    pub(crate) fn asked(&self) -> Vec<String> {
        let asked = self.state.asked.lock().unwrap();
        let line = |request: &Request| format!("{} {}", request.method, request.path);
        let mut lines: Vec<_> = asked.iter().map(line).collect();
        lines.sort_unstable();
        lines
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        self.state.asked.lock().unwrap().clone()
    }

    /// Bytes that the kernel took for the clients.
    pub(crate) fn sent(&self) -> u64 {
        self.state.sent.load(Ordering::SeqCst)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.state.over.store(true, Ordering::SeqCst);
        drop(TcpStream::connect(self.address));
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

/// Answers one request and closes. A client that leaves early is no error.
fn serve(stream: TcpStream, handler: Handler, state: &State) {
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream.set_write_timeout(Some(LONG)).unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let Some(request) = read_request(&mut reader) else {
        return;
    };
    state.asked.lock().unwrap().push(request.clone());
    let mut stream = stream;
    let mut send = |bytes: &[u8]| {
        let done = stream.write_all(bytes).is_ok();
        if done {
            state.sent.fetch_add(bytes.len() as u64, Ordering::SeqCst);
        }
        done
    };
    match handler(&request) {
        Reply::Answer(status, headers, body) => {
            let mut head = format!("HTTP/1.1 {status} x\r\nContent-Length: {}\r\n", body.len());
            for (name, value) in headers {
                head.push_str(&format!("{name}: {value}\r\n"));
            }
            head.push_str("Connection: close\r\n\r\n");
            send(&[head.as_bytes(), &body].concat());
        }
        Reply::Raw(bytes) => {
            send(bytes);
        }
        Reply::Hang(bytes) => {
            send(bytes);
            // Until the client closes its end.
            let _ = reader.read_to_end(&mut Vec::new());
        }
        Reply::Endless(first, then) => {
            if send(first) {
                while send(then) {}
            }
        }
    }
}

fn read_request(reader: &mut impl BufRead) -> Option<Request> {
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split(' ');
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(": ") else {
            break;
        };
        headers.push((name.to_owned(), value.to_owned()));
    }
    Some(Request {
        method,
        path,
        headers,
    })
}
