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

async fn connect(home: &Home) -> Result<UnixStream> {
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
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start")?;
    runtime.block_on(call(home, method, path, body))
}

/// The same where there is a runtime.
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
