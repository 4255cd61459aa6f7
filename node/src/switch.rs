//! What `blanket` asks the switch of its own node, over a Unix socket that is
//! its owner's only.

use std::io::ErrorKind;
use std::time::Duration;

use anyhow::{Context, Result};
use hyper::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::daemon::http;
use crate::failure::failure;
use crate::home::Home;

/// The longest that a request may take.
const LIMIT: Duration = Duration::from_secs(30);

pub(crate) async fn connect(home: &Home) -> Result<UnixStream> {
    let socket = home.switch_socket();
    UnixStream::connect(&socket).await.map_err(|error| {
        let path = socket.display();
        match error.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => failure(
                format!("no switch runs here: there is nobody at {path}"),
                "run blanket-switch",
            ),
            _ => failure(
                format!("cannot ask the switch at {path}: {error}"),
                "run this as the user that blanket-switch runs as",
            ),
        }
    })
}

/// Asks the switch of this node.
pub(crate) fn ask<A: DeserializeOwned>(
    home: &Home,
    method: Method,
    path: &str,
    body: Option<&impl Serialize>,
) -> Result<A> {
    runtime()?.block_on(call(home, method, path, body))
}

/// The same for who waits for other things, too.
pub(crate) async fn call<A: DeserializeOwned>(
    home: &Home,
    method: Method,
    path: &str,
    body: Option<&impl Serialize>,
) -> Result<A> {
    let asked = http::call(connect(home).await?, method, path, body);
    tokio::time::timeout(LIMIT, asked)
        .await
        .context("the switch does not answer")?
}

/// Where a command waits for several things.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().build().context("cannot start")
}

/// A text that the switch tells.
pub(crate) fn fetch(home: &Home, path: &str) -> Result<String> {
    runtime()?.block_on(async {
        let io = connect(home).await?;
        let text = async {
            let mut answer = http::download(io, Method::GET, path, None::<&()>).await?;
            let mut text = Vec::new();
            while let Some(bytes) = answer.chunk().await? {
                text.extend_from_slice(&bytes);
            }
            Ok(String::from_utf8(text)?)
        };
        tokio::time::timeout(LIMIT, text)
            .await
            .context("the switch does not answer")?
    })
}
