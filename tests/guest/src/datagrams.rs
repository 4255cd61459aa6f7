//! What is sent to the guest arrives, once and in order.

use std::io;
use std::net::UdpSocket;
use std::time::Duration;

use serde_json::json;

use crate::Report;

/// Silence that is the end.
const SILENCE: Duration = Duration::from_secs(3);

/// Receives datagrams with the numbers from 1 on, until there is silence.
pub(crate) fn run(port: u16) -> io::Result<Report> {
    let socket = UdpSocket::bind(("0.0.0.0", port))?;
    let (mut came, mut last, mut wrong) = (0u64, 0u64, Vec::new());
    let mut bytes = [0; 64];
    loop {
        let n = match socket.recv(&mut bytes) {
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        };
        socket.set_read_timeout(Some(SILENCE))?;
        let text = String::from_utf8_lossy(&bytes[..n]);
        let number: u64 = text.trim().parse().map_err(io::Error::other)?;
        if number != last + 1 && wrong.len() < 20 {
            wrong.push([last, number]);
        }
        (came, last) = (came + 1, number);
    }
    Ok(Report {
        good: wrong.is_empty(),
        json: json!({ "came": came, "wrong": wrong }),
    })
}
