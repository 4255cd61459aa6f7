//! As much of HTTP/1.1 as metadata services and their clients speak.

use std::io::{self, Read};

/// More headers than any client sends.
const MAX_HEADERS: usize = 32;

/// A longer request is refused.
const MAX_REQUEST: usize = 16 * 1024;

/// A request without a body, as all requests to metadata services are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) method: String,
    /// Without the query, and without a slash at the end.
    pub(super) path: String,
    pub(super) query: String,
    headers: Vec<(String, String)>,
    /// Whether the connection stays open afterwards.
    pub(super) keep_alive: bool,
}

impl Request {
    /// Reads the next request. `None` at the end of the connection.
    pub(super) fn read(mut from: impl Read) -> io::Result<Option<Self>> {
        let mut bytes = Vec::new();
        // Nothing comes behind a request before it is answered, so nothing of the next is read.
        let mut buffer = [0; 4096];
        loop {
            let len = from.read(&mut buffer)?;
            if len == 0 {
                return Ok(None);
            }
            bytes.extend_from_slice(&buffer[..len]);
            if let Some(request) = Self::parse(&bytes)? {
                return Ok(Some(request));
            }
            if bytes.len() > MAX_REQUEST {
                return Err(io::Error::other("the request is too long"));
            }
        }
    }

    /// `None` when it is not complete.
    fn parse(bytes: &[u8]) -> io::Result<Option<Self>> {
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut parsed = httparse::Request::new(&mut headers);
        if parsed.parse(bytes).map_err(io::Error::other)?.is_partial() {
            return Ok(None);
        }
        let target = parsed.path.unwrap_or_default();
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let mut request = Self {
            method: parsed.method.unwrap_or_default().to_owned(),
            path: path.trim_end_matches('/').to_owned(),
            query: query.to_owned(),
            headers: parsed
                .headers
                .iter()
                .map(|header| (header.name.to_owned(), text(header.value)))
                .collect(),
            keep_alive: false,
        };
        request.keep_alive = match request.header("connection") {
            Some(value) => value.eq_ignore_ascii_case("keep-alive"),
            None => parsed.version == Some(1),
        };
        Ok(Some(request))
    }

    /// The value of a header, whatever the case of its name.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        let found = |(header, _): &&(String, String)| header.eq_ignore_ascii_case(name);
        self.headers
            .iter()
            .find(found)
            .map(|(_, value)| value.as_str())
    }

    /// The value of a field of the query.
    pub(super) fn field(&self, name: &str) -> Option<&str> {
        self.query
            .split('&')
            .filter_map(|field| field.split_once('='))
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value)
    }
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Response {
    pub(super) status: u16,
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) body: Vec<u8>,
}

impl Response {
    /// A plain text.
    pub(super) fn text(body: impl Into<String>) -> Self {
        Self::new(200, "text/plain", body)
    }

    /// A JSON document.
    pub(super) fn json(body: &serde_json::Value) -> Self {
        Self::new(200, "application/json", body.to_string())
    }

    /// An answer with this status.
    pub(super) fn error(status: u16, body: impl Into<String>) -> Self {
        Self::new(status, "text/plain", body)
    }

    fn new(status: u16, kind: &str, body: impl Into<String>) -> Self {
        Self {
            status,
            headers: vec![("Content-Type", kind.to_owned())],
            body: body.into().into_bytes(),
        }
    }

    /// Adds a header.
    pub(super) fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    /// The bytes on the wire.
    pub(super) fn encode(&self, keep_alive: bool) -> Vec<u8> {
        let reason = match self.status {
            200 => "OK",
            400 => "Bad Request",
            401 => "Unauthorized",
            403 => "Forbidden",
            405 => "Method Not Allowed",
            _ => "Not Found",
        };
        let mut head = format!("HTTP/1.1 {} {reason}\r\n", self.status);
        for (name, value) in &self.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        let connection = if keep_alive { "keep-alive" } else { "close" };
        head.push_str(&format!(
            "Content-Length: {}\r\nConnection: {connection}\r\n\r\n",
            self.body.len()
        ));
        [head.as_bytes(), &self.body].concat()
    }
}

#[cfg(test)]
impl Request {
    /// The request of a client that sends these headers.
    pub(super) fn of(method: &str, target: &str, headers: &[(&str, &str)]) -> Self {
        let mut text = format!("{method} {target} HTTP/1.1\r\n");
        for (name, value) in headers {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        Self::parse((text + "\r\n").as_bytes()).unwrap().unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_request_is_taken_apart_however_it_arrives() {
        struct Slow<'a>(&'a [u8]);
        impl Read for Slow<'_> {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                self.0.read(&mut buffer[..1])
            }
        }
        let wire = b"GET /a/b/?x=1&y=2 HTTP/1.1\r\nMetadata-Flavor: Google\r\n\r\n";
        let request = Request::read(Slow(wire)).unwrap().unwrap();
        assert_eq!((&*request.method, &*request.path), ("GET", "/a/b"));
        assert_eq!(request.header("metadata-flavor"), Some("Google"));
        assert_eq!((request.field("y"), request.field("z")), (Some("2"), None));
        assert!(request.keep_alive);
        assert!(!Request::of("GET", "/", &[("Connection", "close")]).keep_alive);
    }

    proptest! {
        #[test]
        fn garbage_is_an_error_or_the_end_but_no_more(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = Request::read(bytes.as_slice());
        }
    }
}
