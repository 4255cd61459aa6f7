//! A blocking client of the monitor's API.
//!
//! Each request has a connection of its own, so a client can be kept for as
//! long as one likes and never holds a monitor's socket.

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::SendRequest;
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};

use crate::api::types::{
    Action, METRICS_PATH, MIGRATION_PATH, Metrics, Problem, SNAPSHOT_PATH, SYSRQ_PATH, SysRq,
    TARGET_PATH, Target, VM_PATH, VmInfo,
};
use crate::config::VmConfig;
use crate::migrate;

/// Longest answer that is read, in bytes. A VM's description is far smaller.
const MAX_ANSWER: usize = 4 << 20;

/// How long an answer may take unless [`Client::with_timeout`] says otherwise.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No monitor listens on the socket.
    #[error("cannot reach the monitor at {}: {source}", socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The monitor took the request and did not answer in time.
    #[error("the monitor at {} did not answer within {} s", socket.display(), timeout.as_secs_f32())]
    Timeout {
        /// The socket.
        socket: PathBuf,
        /// How long the client waited.
        timeout: Duration,
    },
    /// The connection broke, or what came is not the API's language.
    #[error("no proper answer from the monitor at {}: {message}", socket.display())]
    Protocol {
        /// The socket.
        socket: PathBuf,
        /// What was wrong.
        message: String,
    },
    /// The monitor refused, or failed to do it.
    #[error("{problem}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// The reason and the remedy.
        problem: Problem,
    },
    /// What was asked for cannot be written down.
    #[error("cannot write the snapshot: {0}")]
    Output(io::Error),
    /// The client itself could not be set up.
    #[error("cannot set up the client of the monitor's API: {0}")]
    Setup(io::Error),
}

/// A client of one monitor.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
    timeout: Duration,
    runtime: Runtime,
}

impl Client {
    /// A client of the monitor that listens on `socket`. Nothing is connected
    /// until the first request.
    ///
    /// # Errors
    /// [`Error::Setup`] if the process has no descriptors left.
    pub fn new(socket: impl Into<PathBuf>) -> Result<Self, Error> {
        Ok(Self {
            socket: socket.into(),
            timeout: TIMEOUT,
            runtime: Builder::new_current_thread()
                .enable_io()
                .enable_time()
                .build()
                .map_err(Error::Setup)?,
        })
    }

    /// This client with another limit for each whole request.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The socket that requests go to.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Builds the VM.
    ///
    /// # Errors
    /// The configuration cannot work on this node, or there is a VM already.
    pub fn create(&self, config: &VmConfig) -> Result<VmInfo, Error> {
        self.request(Method::PUT, VM_PATH, Some(config))
    }

    /// Does something to the VM.
    ///
    /// # Errors
    /// The VM is not in a state for it, or it failed.
    pub fn act(&self, action: Action) -> Result<VmInfo, Error> {
        self.request(Method::POST, action.path(), None::<&()>)
    }

    /// Asks the guest to use so much of what it has.
    ///
    /// # Errors
    /// It has not been started, or cannot be asked for that.
    pub fn set_target(&self, target: &Target) -> Result<VmInfo, Error> {
        self.request(Method::PUT, TARGET_PATH, Some(target))
    }

    /// Presses a SysRq key of the guest's.
    ///
    /// # Errors
    /// The guest does not run, or there is no such key.
    pub fn press_sysrq(&self, key: char) -> Result<VmInfo, Error> {
        self.request(Method::PUT, SYSRQ_PATH, Some(&SysRq { key }))
    }

    /// Describes the VM.
    ///
    /// # Errors
    /// There is no VM yet, or the monitor cannot be reached.
    pub fn info(&self) -> Result<VmInfo, Error> {
        self.request(Method::GET, VM_PATH, None::<&()>)
    }

    /// Reads the counters.
    ///
    /// # Errors
    /// There is no VM yet, or the monitor cannot be reached.
    pub fn metrics(&self) -> Result<Metrics, Error> {
        self.request(Method::GET, METRICS_PATH, None::<&()>)
    }

    /// Has the VM leave for the destination that comes next; the configuration
    /// that the destination's machine is to have.
    ///
    /// # Errors
    /// It does not run, or cannot be moved.
    pub fn migrate(&self, request: &migrate::Request) -> Result<VmConfig, Error> {
        self.request(Method::PUT, MIGRATION_PATH, Some(request))
    }

    /// How far the VM's migration is, or how it went.
    ///
    /// # Errors
    /// The monitor cannot be reached.
    pub fn migration(&self) -> Result<blanket_migration::Status, Error> {
        self.request(Method::GET, MIGRATION_PATH, None::<&()>)
    }

    /// Ends the VM's migration, if it has not been handed over.
    ///
    /// # Errors
    /// The monitor cannot be reached.
    pub fn cancel_migration(&self) -> Result<blanket_migration::Status, Error> {
        self.request(Method::DELETE, MIGRATION_PATH, None::<&()>)
    }

    /// Writes the [stream](crate::snapshot::stream) of a VM's snapshot to `out`.
    /// Each piece has the client's limit of time.
    ///
    /// # Errors
    /// The VM can only be saved at rest, or `out` does not take it.
    pub fn snapshot(&self, out: &mut impl io::Write) -> Result<(), Error> {
        let request = self.http(Method::GET, SNAPSHOT_PATH, Vec::new())?;
        self.runtime.block_on(async {
            let (mut sender, connection) = self.connect().await?;
            let answer = async move {
                let answer = self.in_time(sender.send_request(request)).await?;
                let status = answer.status();
                let mut body = answer.into_body();
                if !status.is_success() {
                    let bytes = self
                        .in_time(Limited::new(body, MAX_ANSWER).collect())
                        .await?;
                    return Err(refused(SNAPSHOT_PATH, status, &bytes.to_bytes()));
                }
                while let Some(frame) = self
                    .in_time(async { body.frame().await.transpose() })
                    .await?
                {
                    if let Ok(piece) = frame.into_data() {
                        out.write_all(&piece).map_err(Error::Output)?;
                    }
                }
                Ok(())
            };
            drive(connection, answer).await
        })
    }

    fn request<B: Serialize, A: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<A, Error> {
        let body = body
            .map(serde_json::to_vec)
            .transpose()
            .map_err(|error| self.protocol(&error))?
            .unwrap_or_default();
        let request = self.http(method, path, body)?;
        let (status, bytes) = self.runtime.block_on(async {
            tokio::time::timeout(self.timeout, self.exchange(request))
                .await
                .unwrap_or_else(|_| Err(self.late()))
        })?;
        if status.is_success() {
            return serde_json::from_slice(&bytes).map_err(|error| self.protocol(&error));
        }
        Err(refused(path, status, &bytes))
    }

    fn http(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<Request<Full<Bytes>>, Error> {
        Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "localhost")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| self.protocol(&error))
    }

    /// One step of an answer, within the client's limit of time.
    async fn in_time<T, E: ToString>(
        &self,
        step: impl Future<Output = Result<T, E>>,
    ) -> Result<T, Error> {
        match tokio::time::timeout(self.timeout, step).await {
            Ok(result) => result.map_err(|error| self.protocol(&error)),
            Err(_) => Err(self.late()),
        }
    }

    fn late(&self) -> Error {
        Error::Timeout {
            socket: self.socket.clone(),
            timeout: self.timeout,
        }
    }

    /// A connection of its own for one request, and what moves its bytes.
    async fn connect(&self) -> Result<(SendRequest<Full<Bytes>>, impl Future), Error> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|source| Error::Connect {
                socket: self.socket.clone(),
                source,
            })?;
        hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.protocol(&error))
    }

    /// Sends one request over a connection of its own and reads the answer.
    async fn exchange(&self, request: Request<Full<Bytes>>) -> Result<(StatusCode, Bytes), Error> {
        let (mut sender, connection) = self.connect().await?;
        let answer = async move {
            let answer = sender
                .send_request(request)
                .await
                .map_err(|error| self.protocol(&error))?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), MAX_ANSWER)
                .collect()
                .await
                .map_err(|error| self.protocol(&error))?;
            Ok((status, body.to_bytes()))
        };
        drive(connection, answer).await
    }

    fn protocol(&self, message: &impl ToString) -> Error {
        Error::Protocol {
            socket: self.socket.clone(),
            message: message.to_string(),
        }
    }
}

/// The error of an answer that is none.
fn refused(path: &str, status: StatusCode, bytes: &[u8]) -> Error {
    Error::Refused {
        status: status.as_u16(),
        problem: serde_json::from_slice(bytes).unwrap_or_else(|_| Problem {
            error: format!("the monitor answered {path} with {status}"),
            remedy: None,
        }),
    }
}

/// Runs `answer` to its end while `connection` moves the bytes.
async fn drive<T>(connection: impl Future, answer: impl Future<Output = T>) -> T {
    let mut connection = std::pin::pin!(connection);
    let mut answer = std::pin::pin!(answer);
    tokio::select! {
        result = &mut answer => result,
        // The connection may close once it has handed over the whole answer,
        // or break; either way `answer` now ends by itself.
        _ = &mut connection => answer.await,
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;
    use std::thread::{self, JoinHandle};

    use super::*;

    /// A server that takes one connection, answers it with `answer`, and
    /// returns what it was asked.
    fn server(answer: &'static [u8]) -> (tempfile::TempDir, PathBuf, JoinHandle<String>) {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("api.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let thread = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = vec![0; 4096];
            let n = stream.read(&mut request).unwrap();
            stream.write_all(answer).unwrap();
            String::from_utf8(request[..n].to_vec()).unwrap()
        });
        (dir, socket, thread)
    }

    #[test]
    fn a_good_answer_is_parsed_and_the_request_is_plain_http() {
        let (_dir, socket, thread) = server(
            b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n\
              {\"devices\":{\"net0\":{\"rx\":3}},\"vcpus\":[],\
              \"memory\":{\"guest\":1,\"guest_resident\":2,\"resident\":3}}",
        );
        let metrics = Client::new(socket).unwrap().metrics().unwrap();
        assert_eq!(metrics.devices["net0"]["rx"], 3);
        let request = thread.join().unwrap();
        assert!(
            request.starts_with("GET /metrics HTTP/1.1\r\n"),
            "{request}"
        );
    }

    #[test]
    fn a_refusal_carries_the_remedy() {
        let (_dir, socket, thread) = server(
            b"HTTP/1.1 409 Conflict\r\ncontent-length: 38\r\n\r\n\
              {\"error\":\"busy\",\"remedy\":\"wait a bit\"}",
        );
        let error = Client::new(socket).unwrap().act(Action::Pause).unwrap_err();
        assert_eq!(error.to_string(), "busy (wait a bit)");
        assert!(matches!(error, Error::Refused { status: 409, .. }));
        assert!(thread.join().unwrap().starts_with("POST /vm/pause "));
    }

    #[test]
    fn garbage_is_an_error_that_names_the_socket() {
        for garbage in [
            &b"SSH-2.0-nothing\r\n"[..],
            b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n{]}",
            b"HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\n{",
            b"",
        ] {
            let (_dir, socket, thread) = server(garbage);
            let error = Client::new(&socket).unwrap().info().unwrap_err();
            assert!(matches!(error, Error::Protocol { .. }), "{error:?}");
            assert!(error.to_string().contains(socket.to_str().unwrap()));
            thread.join().unwrap();
        }
    }

    #[test]
    fn a_silent_monitor_ends_in_a_timeout_and_an_absent_one_in_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("api.sock");
        let client = Client::new(&socket)
            .unwrap()
            .with_timeout(Duration::from_millis(50));
        assert!(matches!(client.info(), Err(Error::Connect { .. })));
        let _listener = UnixListener::bind(&socket).unwrap();
        assert!(matches!(client.info(), Err(Error::Timeout { .. })));
    }
}
