//! The secrets of a TLS connection, for who takes it over after its handshake.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use blanket_migration::records::{Secrets, Suite, Traffic};
use rustls::{ClientConfig, ClientConnection, KeyLog, ServerConfig, ServerConnection};
use zeroize::Zeroizing;

/// What rustls calls the secrets of application data: the client's, the server's.
const LABELS: [&str; 2] = ["CLIENT_TRAFFIC_SECRET_0", "SERVER_TRAFFIC_SECRET_0"];

/// The secrets of one connection, until they are given away or forgotten.
///
/// What rustls extracts are keys. The secrets that these were made of are needed,
/// too: the next keys are made of them ([`blanket_migration::records`]).
#[derive(Default)]
pub(crate) struct Kept(Mutex<[Option<Zeroizing<Vec<u8>>>; 2]>);

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Kept")
    }
}

impl KeyLog for Kept {
    fn log(&self, label: &str, _: &[u8], secret: &[u8]) {
        if let Some(index) = LABELS.iter().position(|it| *it == label) {
            let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            kept[index] = Some(Zeroizing::new(secret.to_vec()));
        }
    }

    fn will_log(&self, label: &str) -> bool {
        LABELS.contains(&label)
    }
}

impl Kept {
    /// A configuration like `config` for one connection, of which this keeps them.
    pub(crate) fn serving(config: &ServerConfig) -> (Arc<ServerConfig>, Arc<Self>) {
        let (mut config, kept) = (config.clone(), Arc::<Self>::default());
        config.key_log = Arc::clone(&kept) as Arc<dyn KeyLog>;
        config.enable_secret_extraction = true;
        (Arc::new(config), kept)
    }

    /// The same for who connects.
    pub(crate) fn asking(config: &ClientConfig) -> (Arc<ClientConfig>, Arc<Self>) {
        let (mut config, kept) = (config.clone(), Arc::<Self>::default());
        config.key_log = Arc::clone(&kept) as Arc<dyn KeyLog>;
        config.enable_secret_extraction = true;
        (Arc::new(config), kept)
    }

    /// Whether they can be had of a connection that has them here.
    pub(crate) fn has(&self, connection: &rustls::CommonState) -> bool {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let suite = connection.negotiated_cipher_suite();
        let known = suite.and_then(|suite| Suite::of(suite.suite().into()));
        known.is_some() && kept.iter().all(Option::is_some)
    }

    /// Keeps them no more.
    pub(crate) fn forget(&self) -> [Option<Zeroizing<Vec<u8>>>; 2] {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Those of a server's connection, on which nothing comes but what was read.
    pub(crate) fn of_server(&self, mut connection: ServerConnection) -> Result<Secrets> {
        let state = connection.process_new_packets()?;
        is_quiet(&state)?;
        let suite = suite(&connection)?;
        let numbers = connection.dangerous_extract_secrets()?;
        self.secrets(suite, [1, 0], [numbers.tx.0, numbers.rx.0])
    }

    /// The same of a client's.
    pub(crate) fn of_client(&self, mut connection: ClientConnection) -> Result<Secrets> {
        let state = connection.process_new_packets()?;
        is_quiet(&state)?;
        let suite = suite(&connection)?;
        let numbers = connection.dangerous_extract_secrets()?;
        self.secrets(suite, [0, 1], [numbers.tx.0, numbers.rx.0])
    }

    /// Whose secrets, in which order, with the numbers of the next records.
    fn secrets(&self, suite: Suite, whose: [usize; 2], numbers: [u64; 2]) -> Result<Secrets> {
        let kept = self.forget();
        let traffic = |which: usize| {
            let secret = kept[whose[which]].as_deref();
            let secret = secret.context("there are no secrets of a connection")?;
            anyhow::Ok(Traffic::new(suite, secret, numbers[which])?)
        };
        Ok(Secrets::new(suite, traffic(0)?, traffic(1)?))
    }
}

fn suite(connection: &rustls::CommonState) -> Result<Suite> {
    let suite = connection.negotiated_cipher_suite();
    let suite = suite.and_then(|suite| Suite::of(suite.suite().into()));
    suite.context("a connection has another kind of encryption")
}

/// Nobody may have sent what is read by nobody.
fn is_quiet(state: &rustls::IoState) -> Result<()> {
    let quiet = state.plaintext_bytes_to_read() == 0 && !state.peer_has_closed();
    anyhow::ensure!(quiet, "the other node has sent more than it may");
    Ok(())
}
