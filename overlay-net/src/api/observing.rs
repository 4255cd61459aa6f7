//! Routes for those who watch.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post, put};
use hyper::body::{Bytes, Frame};
use tokio::sync::Mutex;

use super::metrics;
use super::observe::{CAPTURE, CaptureSpec, MirrorSpec, PingSpec};
use super::server::{Body, Shared, answer, problem, status, with_body};
use crate::bridge::PortConfig;
use crate::control::Control;
use crate::switch::Stream;

/// The longest that an answer to a ping is waited for.
const LONGEST: Duration = Duration::from_secs(20);

pub(super) fn routes() -> Router<Arc<Mutex<Control>>> {
    Router::new()
        .route("/captures", post(capture))
        .route("/captures/{number}", delete(end_capture))
        .route("/metrics", get(figures))
        .route("/ping", post(ping))
        .route("/ports/{name}/options", put(set_port))
        .route("/mirrors", get(mirrors))
        .route("/mirrors/{name}", put(put_mirror).delete(remove_mirror))
}

/// A capture as an answer's body.
struct Captured(Stream);

impl hyper::body::Body for Captured {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let next = self.0.poll(context);
        next.map(|bytes| bytes.map(|bytes| Ok(Frame::data(Bytes::from(bytes)))))
    }
}

async fn capture(State(control): State<Shared>, spec: Body<CaptureSpec>) -> Response {
    let spec = match spec {
        Ok(axum::Json(spec)) => spec,
        Err(rejection) => return problem(rejection.status(), rejection.body_text(), None),
    };
    match control.lock().await.capture(spec).await {
        Ok(stream) => {
            let number = stream.id.to_string();
            let headers = [
                (CONTENT_TYPE.as_str(), "application/x-pcapng".to_owned()),
                (CAPTURE, number),
            ];
            (headers, axum::body::Body::new(Captured(stream))).into_response()
        }
        Err(error) => problem(status(&error), error.to_string(), None),
    }
}

async fn end_capture(State(control): State<Shared>, Path(number): Path<u64>) -> Response {
    answer(control.lock().await.end_capture(number).await)
}

async fn figures(State(control): State<Shared>) -> Response {
    match control.lock().await.figures().await {
        Ok(figures) => {
            let headers = [(CONTENT_TYPE, metrics::CONTENT_TYPE)];
            (headers, metrics::text(&figures)).into_response()
        }
        Err(error) => problem(status(&error), error.to_string(), None),
    }
}

async fn ping(State(control): State<Shared>, spec: Body<PingSpec>) -> Response {
    let spec = match spec {
        Ok(axum::Json(spec)) => spec,
        Err(rejection) => return problem(rejection.status(), rejection.body_text(), None),
    };
    let timeout = Duration::from_millis(spec.timeout_ms).min(LONGEST);
    let sent = control.lock().await.ping(spec).await;
    let (number, told) = match sent {
        Ok(sent) => sent,
        Err(error) => return answer::<()>(Err(error)),
    };
    // Nobody else has to wait meanwhile.
    let pong = tokio::time::timeout(timeout, told).await;
    let pong = pong.ok().and_then(Result::ok);
    if pong.is_none()
        && let Err(error) = control.lock().await.end_ping(number).await
    {
        return answer::<()>(Err(error));
    }
    answer(Ok(pong))
}

async fn mirrors(State(control): State<Shared>) -> Response {
    answer(control.lock().await.mirrors().await)
}

async fn put_mirror(
    State(control): State<Shared>,
    Path(name): Path<String>,
    spec: Body<MirrorSpec>,
) -> Response {
    with_body(&control, spec, async |control, spec| {
        control.put_mirror(name, spec).await
    })
    .await
}

async fn set_port(
    State(control): State<Shared>,
    Path(name): Path<String>,
    config: Body<PortConfig>,
) -> Response {
    with_body(&control, config, async |control, config| {
        control.set_port(name, config).await
    })
    .await
}

async fn remove_mirror(State(control): State<Shared>, Path(name): Path<String>) -> Response {
    answer(control.lock().await.remove_mirror(name).await)
}
