//! Moving a session's bytes, over any stream.

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, sleep_until};

use super::session::{BACKLOG, Roles};
use super::{Datapath, Hub, Session};

/// Controllers at one datapath at most.
pub const MOST: usize = 16;

/// How long a controller may be silent before it is asked; after three times
/// as long it is taken to be gone.
const SILENCE: Duration = Duration::from_secs(5);

/// How sessions get at the datapath that they work on.
pub trait Reach: Clone + Send + Sync + 'static {
    /// Does something with it, between two bursts of frames.
    fn with<R: Send + 'static>(
        &self,
        act: impl FnOnce(&mut dyn Datapath) -> R + Send + 'static,
    ) -> impl Future<Output = io::Result<R>> + Send;
}

/// A datapath with its controllers. Cheap to clone.
#[derive(Clone)]
pub struct Endpoint<R> {
    reach: R,
    hub: Hub,
    roles: Roles,
    sessions: Arc<AtomicUsize>,
}

/// One of the sessions there may be.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(of: &Arc<AtomicUsize>) -> io::Result<Self> {
        let next = |count| (count < MOST).then_some(count + 1);
        of.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next)
            .map_err(|_| {
                io::Error::other(format!("there are {MOST} controllers: end one of them"))
            })?;
        Ok(Self(Arc::clone(of)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<R: Reach> Endpoint<R> {
    /// Controllers of the datapath behind `reach`, which are told what `hub`
    /// tells.
    #[must_use]
    pub fn new(reach: R, hub: Hub) -> Self {
        Self {
            reach,
            hub,
            roles: Roles::default(),
            sessions: Arc::default(),
        }
    }

    /// Serves one controller over `stream` until it goes; TLS has been
    /// negotiated before. `greeted` is called when it has turned out to be one.
    ///
    /// # Errors
    ///
    /// The connection broke, what came was no OpenFlow, there are too many
    /// controllers, or the datapath is gone.
    pub async fn serve<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: S,
        greeted: impl FnOnce(),
    ) -> io::Result<()> {
        let _place = Place::take(&self.sessions)?;
        let inbox = self.hub.join();
        let (mut reader, mut writer) = tokio::io::split(stream);
        let mut session = Session::among(&self.roles);
        let mut greeted = Some(greeted);
        let mut buffer = vec![0; 16 << 10];
        let (mut heard, mut asked, mut unflushed) = (Instant::now(), false, false);
        loop {
            // A controller that does not read is told no more than it has room for.
            while session.output().len() < BACKLOG
                && let Some(event) = inbox.next()
            {
                session.on_event(&event);
            }
            if session.is_behind() && session.output().len() < BACKLOG {
                session = self.answer(session, &[], &mut writer).await?;
                continue;
            }
            let waits = !session.output().is_empty();
            let deadline = heard + if asked { 3 * SILENCE } else { SILENCE };
            let send = async {
                if waits {
                    writer.write(session.output()).await
                } else {
                    // A TLS stream may hold bytes back.
                    writer.flush().await.map(|()| 0)
                }
            };
            tokio::select! {
                sent = send, if waits || unflushed => {
                    match sent? {
                        0 if waits => return Err(ErrorKind::WriteZero.into()),
                        len => session.sent(len),
                    }
                    unflushed = waits;
                }
                read = reader.read(&mut buffer), if !session.is_behind() => {
                    let len = read?;
                    if len == 0 {
                        return Ok(());
                    }
                    (heard, asked) = (Instant::now(), false);
                    session = self.answer(session, &buffer[..len], &mut writer).await?;
                    if session.is_greeted() && let Some(greeted) = greeted.take() {
                        greeted();
                    }
                }
                () = inbox.wait(), if session.output().len() < BACKLOG => {}
                () = sleep_until(deadline) => {
                    if asked {
                        return Err(io::Error::new(
                            ErrorKind::TimedOut,
                            "the controller does not answer",
                        ));
                    }
                    session.echo();
                    asked = true;
                }
            }
        }
    }

    /// Has the session take what has come.
    async fn answer<W: AsyncWrite + Unpin>(
        &self,
        mut session: Session,
        bytes: &[u8],
        writer: &mut W,
    ) -> io::Result<Session> {
        let bytes = bytes.to_vec();
        let (mut session, result) = self
            .reach
            .with(move |datapath| {
                let result = session.on_bytes(&bytes, datapath);
                (session, result)
            })
            .await?;
        for event in session.take_events() {
            // Who has no room for it has been told too much already.
            let _ = self.hub.send(&event);
        }
        if let Err(fatal) = result {
            // Why, as far as it can still be told.
            let told = async {
                writer.write_all(session.output()).await?;
                writer.flush().await
            };
            let _ = tokio::time::timeout(SILENCE, told).await;
            return Err(io::Error::new(ErrorKind::InvalidData, fatal));
        }
        Ok(session)
    }
}
