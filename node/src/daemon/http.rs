//! HTTP/1.1 over whatever carries bytes: one request for each connection.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{self, Poll};
use std::time::Duration;

use anyhow::{Context, Result};
use axum::Router;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use blanket_vmm::api::types::Problem;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Body, Bytes, Frame, Incoming};
use hyper::{Method, Request, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::failure::{answered, problem};

/// The longest body that is read, in bytes.
pub(super) const MAX_BODY: usize = 4 << 20;

/// How long a client may take to send a request's head.
const HEAD: Duration = Duration::from_secs(10);

/// What bytes come and go through.
pub(crate) trait Io: AsyncRead + AsyncWrite + Unpin + Send + 'static {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send + 'static> Io for T {}

/// An error as an answer.
#[derive(Clone)]
pub(super) struct Refusal(Problem);

impl<E: Into<anyhow::Error>> From<E> for Refusal {
    fn from(error: E) -> Self {
        Self(problem(&error.into()))
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (StatusCode::BAD_REQUEST, axum::Json(self.0)).into_response()
    }
}

/// Serves one request, for no longer than `limit`.
pub(super) async fn serve(io: impl Io, router: Router, limit: Duration) {
    let served = tokio::time::timeout(limit, serve_unlimited(io, router));
    if served.await.is_err() {
        tracing::debug!("a request took longer than {} s", limit.as_secs());
    }
}

/// Serves one request, however long it takes.
pub(super) async fn serve_unlimited(io: impl Io, router: Router) {
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .keep_alive(false)
        .max_buf_size(64 << 10)
        .serve_connection(TokioIo::new(io), TowerToHyperService::new(router));
    if let Err(error) = connection.await {
        tracing::debug!("a request has failed: {error}");
    }
}

/// The body of an answer that goes on for as long as the client listens: what
/// it holds is then dropped. It says `null`, so that the client knows.
pub(super) struct WhileHeard<T> {
    _held: T,
    said: bool,
}

impl<T: Send + Unpin + 'static> WhileHeard<T> {
    pub(super) fn answer(held: T) -> Response {
        let body = Self {
            _held: held,
            said: false,
        };
        Response::new(axum::body::Body::new(body))
    }
}

impl<T: Unpin> Body for WhileHeard<T> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut task::Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.said {
            // The connection wakes the task when the client is gone.
            return Poll::Pending;
        }
        self.said = true;
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"null\n")))))
    }
}

/// Sends one request; the answer, and the connection that it comes over.
async fn send<'a>(
    io: impl Io + 'a,
    method: Method,
    path: &str,
    body: Option<&impl Serialize>,
) -> Result<(Response<Incoming>, Option<Connection<'a>>)> {
    let body = body.map(serde_json::to_vec).transpose()?;
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, "localhost")
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body.unwrap_or_default())))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(io)).await?;
    let mut connection: Connection = Box::pin(connection);
    let mut answer = Box::pin(async move { sender.send_request(request).await });
    tokio::select! {
        answer = &mut answer => Ok((answer?, Some(connection))),
        // It may end before the answer has been taken from it. If the request
        // was not even sent, it knows why.
        ended = &mut connection => match (answer.await, ended) {
            (Err(_), Err(error)) => Err(error.into()),
            (answer, _) => Ok((answer?, None)),
        },
    }
}

/// A connection to a server: it has to be polled for an answer to come.
type Connection<'a> = Pin<Box<dyn Future<Output = hyper::Result<()>> + Send + 'a>>;

/// Makes one request and reads the answer.
pub(crate) async fn call<A: DeserializeOwned>(
    io: impl Io,
    method: Method,
    path: &str,
    body: Option<&impl Serialize>,
) -> Result<A> {
    let (answer, connection) = send(io, method, path, body).await?;
    read(path, answer, connection).await
}

async fn read<A: DeserializeOwned>(
    path: &str,
    answer: Response<Incoming>,
    connection: Option<Connection<'_>>,
) -> Result<A> {
    let status = answer.status();
    let body = Limited::new(answer.into_body(), MAX_BODY).collect();
    let mut body = std::pin::pin!(body);
    let body = match connection {
        Some(connection) => tokio::select! {
            body = &mut body => body,
            _ = connection => body.await,
        },
        None => body.await,
    };
    let body = body.map_err(|error| anyhow::anyhow!("{error}"))?.to_bytes();
    if status.is_success() {
        return serde_json::from_slice(&body).context("the answer cannot be understood");
    }
    Err(match serde_json::from_slice::<Problem>(&body) {
        Ok(problem) => answered(problem),
        Err(_) => anyhow::anyhow!("the answer to {path} is {status}"),
    })
}

/// An answer that goes on: see [`WhileHeard`].
pub(crate) struct Heard {
    _answer: Response<Incoming>,
    _connection: Option<Connection<'static>>,
}

/// Makes a request whose answer goes on for as long as it is wanted.
pub(crate) async fn listen(
    io: impl Io + 'static,
    path: &str,
    body: &impl Serialize,
) -> Result<Heard> {
    let (answer, connection) = send(io, Method::POST, path, Some(body)).await?;
    if answer.status().is_success() {
        return Ok(Heard {
            _answer: answer,
            _connection: connection,
        });
    }
    Err(read::<()>(path, answer, connection)
        .await
        .err()
        .unwrap_or_else(|| anyhow::anyhow!("{path} is refused")))
}

/// An answer whose body is taken as it comes.
pub(crate) struct Download {
    answer: Response<Incoming>,
    connection: Option<Connection<'static>>,
}

impl Download {
    /// A header of the answer.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.answer.headers().get(name)?.to_str().ok()
    }

    /// More of the body; none: that was all.
    pub(crate) async fn chunk(&mut self) -> Result<Option<Bytes>> {
        loop {
            let next = self.answer.frame();
            let frame = match &mut self.connection {
                Some(connection) => tokio::select! {
                    frame = next => frame,
                    _ = connection => {
                        // What has come already is still there to be taken.
                        self.connection = None;
                        continue;
                    }
                },
                None => next.await,
            };
            let Some(frame) = frame else { return Ok(None) };
            if let Ok(bytes) = frame?.into_data() {
                return Ok(Some(bytes));
            }
        }
    }
}

/// Makes one request, whose answer may be long.
pub(crate) async fn download(
    io: impl Io + 'static,
    method: Method,
    path: &str,
    body: Option<&impl Serialize>,
) -> Result<Download> {
    let (answer, connection) = send(io, method, path, body).await?;
    if answer.status().is_success() {
        return Ok(Download { answer, connection });
    }
    Err(read::<()>(path, answer, connection)
        .await
        .err()
        .unwrap_or_else(|| anyhow::anyhow!("{path} is refused")))
}
