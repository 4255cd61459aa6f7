//! One HTTP request, bounded in time and bytes.
//!
//! The client connects to the address that it is given and to no other: it
//! knows no proxies, follows no redirects, and leaves the packets' time to live
//! as it is.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use http_body_util::{BodyExt, Empty, LengthLimitError, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::{HOST, HeaderName, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// The longest answer that is read, in bytes. User data has up to 64 KiB, and
/// comes in Base64 with some documents.
pub const LONGEST_ANSWER: usize = 256 << 10;

/// The longest head of an answer, in bytes.
const LONGEST_HEAD: usize = 16 << 10;

/// The most headers of an answer.
const MOST_HEADERS: usize = 64;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// No connection.
    #[error("no connection: {0}")]
    Connect(#[from] io::Error),
    /// It took too long.
    #[error("no answer in time")]
    Late,
    /// It does not speak HTTP, or broke off.
    #[error("no HTTP: {0}")]
    Protocol(#[from] hyper::Error),
    /// A status that is no success.
    #[error("status {0}")]
    Status(StatusCode),
    /// It sent us elsewhere.
    #[error("a redirect ({0}), which is not followed")]
    Redirect(StatusCode),
    /// The body has no end, or hardly one.
    #[error("an answer of more than {} KiB", LONGEST_ANSWER >> 10)]
    TooLong,
    /// The body broke off.
    #[error("broken off: {0}")]
    Body(String),
    /// An answer that is not the provider's.
    #[error("not what this provider's metadata service answers")]
    Foreign,
}

impl Refusal {
    /// Whether something is there and answers, whatever it says.
    #[must_use]
    pub fn is_answer(&self) -> bool {
        !matches!(self, Self::Connect(_) | Self::Late)
    }

    /// Whether it says that there is no such thing.
    pub(super) fn is_absent(&self) -> bool {
        matches!(self, Self::Status(StatusCode::NOT_FOUND))
    }
}

/// Headers to send.
pub(super) type Headers = Vec<(HeaderName, HeaderValue)>;

/// Headers as a table has them; those that cannot be sent are left out.
pub(super) fn headers<'a>(table: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Headers {
    let sound = |(name, value): (&str, &[u8])| {
        let name = HeaderName::from_bytes(name.as_bytes()).ok()?;
        Some((name, HeaderValue::from_bytes(value).ok()?))
    };
    table.into_iter().filter_map(sound).collect()
}

/// Asks over a connection of its own. The header and value of `seal` must be in
/// the answer, whatever its status.
///
/// # Errors
/// There is no answer, or none of success.
pub(super) async fn ask(
    address: SocketAddr,
    connect: Duration,
    (method, path): (Method, &'static str),
    headers: Headers,
    seal: Option<(&'static str, &'static str)>,
) -> Result<Vec<u8>, Refusal> {
    let stream = timeout(connect, TcpStream::connect(address)).await;
    let stream = stream.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
    let (mut sender, connection) = http1::Builder::new()
        .max_buf_size(LONGEST_HEAD)
        .max_headers(MOST_HEADERS)
        .handshake(TokioIo::new(stream))
        .await?;
    let mut request = Request::new(Empty::<Bytes>::new());
    *request.method_mut() = method;
    *request.uri_mut() = hyper::Uri::from_static(path);
    if let Ok(host) = HeaderValue::from_str(&host(address)) {
        request.headers_mut().insert(HOST, host);
    }
    request.headers_mut().extend(headers);
    let answer = async { take(sender.send_request(request).await?, seal).await };
    tokio::pin!(answer, connection);
    tokio::select! {
        answer = &mut answer => answer,
        // It may close once it has handed over the whole answer, or break;
        // either way `answer` now ends by itself.
        _ = &mut connection => answer.await,
    }
}

/// The host as a request names it: without HTTP's own port.
fn host(address: SocketAddr) -> String {
    match address {
        SocketAddr::V4(v4) if v4.port() == 80 => v4.ip().to_string(),
        SocketAddr::V6(v6) if v6.port() == 80 => format!("[{}]", v6.ip()),
        other => other.to_string(),
    }
}

async fn take(
    answer: Response<Incoming>,
    seal: Option<(&'static str, &'static str)>,
) -> Result<Vec<u8>, Refusal> {
    let status = answer.status();
    if status.is_redirection() {
        return Err(Refusal::Redirect(status));
    }
    let sealed = |(name, value): (&str, &str)| {
        answer.headers().get(name).map(HeaderValue::as_bytes) == Some(value.as_bytes())
    };
    if !seal.is_none_or(sealed) {
        return Err(Refusal::Foreign);
    }
    if status != StatusCode::OK {
        return Err(Refusal::Status(status));
    }
    let body = Limited::new(answer.into_body(), LONGEST_ANSWER)
        .collect()
        .await
        .map_err(|error| {
            if error.is::<LengthLimitError>() {
                Refusal::TooLong
            } else {
                Refusal::Body(error.to_string())
            }
        })?;
    Ok(body.to_bytes().to_vec())
}
