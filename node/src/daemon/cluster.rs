//! How a cluster is made, how nodes come and go, and how each learns of it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use axum::extract::{DefaultBodyLimit, State};
use axum::routing::post;
use axum::{Json, Router};
use hyper::Method;
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::http::Refusal;
use super::{MEMBERSHIP, Node, Trust, http, lock, now};
use crate::cluster::ca::{self, Authority, NODE_LIFE};
use crate::cluster::identity::{Identity, Peer};
use crate::cluster::members::{Member, Membership};
use crate::cluster::names::{Address, NodeName};
use crate::cluster::token::{Fingerprint, Token};
use crate::cluster::{store, tls};
use crate::failure::failure;

/// How often a node asks the CA's who is in the cluster.
const SYNC: Duration = Duration::from_secs(5);

/// How often certificates are looked at.
const CERTIFICATES: Duration = Duration::from_secs(60);

/// How long the whole of joining may take.
const JOIN: Duration = Duration::from_secs(30);

/// So many tokens can be waiting to be used.
const MAX_TOKENS: usize = 100;

/// The longest request to join, in bytes.
const MAX_REQUEST: usize = 16 << 10;

/// Where new nodes ask.
const JOIN_PATH: &str = "/join";

/// What is remembered of a token: enough to know it again, not to make it.
#[derive(Debug, Serialize, Deserialize)]
struct Stored {
    /// SHA-256 of the secret.
    hash: [u8; 32],
    /// In seconds of Unix time.
    expires: u64,
}

/// A new node's request.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct JoinRequest {
    /// The token's id and secret, in hexadecimal.
    id: String,
    secret: String,
    name: NodeName,
    /// Where others reach it; if not told, where this comes from.
    address: Option<Address>,
    /// The port that it listens on.
    port: u16,
    /// For its key, in PEM.
    request: String,
}

/// What a new node is given.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Joined {
    certificate: String,
    ca: String,
    membership: Membership,
}

/// A request for another certificate, and the answer.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Pem {
    pub(super) pem: String,
}

fn token_key(id: &str) -> String {
    format!("token/{id}")
}

fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    anyhow::ensure!(got == N, "the system has no random bytes");
    Ok(bytes)
}

/// 128 random bits as text.
/// 128 random bits, as text.
pub(crate) fn random_text() -> Result<String> {
    Ok(data_encoding::HEXLOWER.encode(&random::<16>()?))
}

/// The API for nodes that are not members yet; this one is at `from`.
pub(super) fn join_routes(node: &Arc<Node>, from: IpAddr) -> Router {
    Router::new()
        .route(JOIN_PATH, post(join))
        .layer(DefaultBodyLimit::max(MAX_REQUEST))
        .with_state((Arc::clone(node), from))
}

async fn join(
    State((node, from)): State<(Arc<Node>, IpAddr)>,
    Json(request): Json<JoinRequest>,
) -> Result<Json<Joined>, Refusal> {
    let result = if lock(&node.limiter).allows(from, Instant::now()) {
        node.admit(&request, from).await
    } else {
        Err(failure(
            "too many attempts to join from this address",
            "wait a minute",
        ))
    };
    if let Err(error) = &result {
        let details = json!({"name": request.name, "from": from, "error": format!("{error:#}")});
        node.audit("join-refused", details);
    }
    Ok(Json(result?))
}

impl Node {
    /// The CA, which this node has to have.
    fn authority(trust: &Trust, membership: &Membership) -> Result<()> {
        if trust.authority.is_some() {
            return Ok(());
        }
        Err(failure(
            "the cluster's CA is on another node",
            format!("do it on node {}", membership.authority),
        ))
    }

    /// Makes a cluster with this node in it.
    pub(super) async fn create(
        self: &Arc<Self>,
        name: NodeName,
        address: Option<Address>,
    ) -> Result<Arc<Membership>> {
        let _changing = self.changing.lock().await;
        self.check_alone()?;
        let bound = self.start_listening().await?;
        let authority = self.files.make_authority()?;
        let key = ca::new_key()?;
        let certificate = authority.sign(&ca::request(&key)?, &name, true, NODE_LIFE)?;
        let ca = self.files.ca_pem()?;
        let identity = Identity::read(&ca, &certificate, &key.serialize_pem())?;
        let member = Member {
            name,
            id: identity.own.id.clone(),
            address: match address {
                Some(address) => address,
                None => Address::from(SocketAddr::new(own_address()?, bound.port())),
            },
        };
        // With the last file this node is a member: all else is there before.
        let membership = Membership::of(member.clone());
        store::write(self.store.as_ref(), MEMBERSHIP, &membership)?;
        self.files.keep(&ca, &certificate, &key.serialize_pem())?;
        let fingerprint = identity.fingerprint().to_string();
        self.set_trust(Some(Trust::new(identity, Some(authority))?));
        self.audit(
            "cluster-made",
            json!({"name": member.name, "id": member.id, "ca": fingerprint}),
        );
        self.set_membership(membership)
    }

    fn check_alone(&self) -> Result<()> {
        match self.trust() {
            None => Ok(()),
            Some(trust) => Err(failure(
                format!("this node is in a cluster already, as {}", trust.name()),
                "blanket node leave takes it out",
            )),
        }
    }

    /// Makes a join token that is good for so long.
    pub(super) fn make_token(&self, life: Duration) -> Result<Token> {
        let (trust, membership) = self.joined()?;
        Self::authority(&trust, &membership)?;
        let store = self.store.as_ref();
        let now = now();
        let mut waiting = 0;
        for key in store.keys(&token_key(""))? {
            let stored: Option<Stored> = store::read(store, &key)?;
            if stored.is_some_and(|stored| stored.expires <= now) {
                store.remove(&key)?;
            } else {
                waiting += 1;
            }
        }
        if waiting >= MAX_TOKENS {
            return Err(failure(
                format!("{waiting} tokens wait to be used"),
                "use them, or wait until they expire",
            ));
        }
        let address = membership.member(trust.name()).map(|own| &own.address);
        let token = Token {
            id: random()?,
            secret: random()?,
            fingerprint: trust.identity.fingerprint(),
            address: address.context("this node is no member")?.clone(),
        };
        let stored = Stored {
            hash: Sha256::digest(token.secret).into(),
            expires: now + life.as_secs(),
        };
        let id = data_encoding::HEXLOWER.encode(&token.id);
        store::write(store, &token_key(&id), &stored)?;
        self.audit(
            "token-made",
            json!({"token": id, "seconds": life.as_secs()}),
        );
        Ok(token)
    }

    /// Whether a token is good; it stays so.
    fn check_token(&self, request: &JoinRequest) -> Result<String> {
        const NO_GOOD: &str = "the join token is wrong, used or expired";
        let bad = || failure(NO_GOOD, "make another: blanket node token on the CA's node");
        let hex = |text: &str| data_encoding::HEXLOWER.decode(text.as_bytes()).ok();
        let id = hex(&request.id)
            .filter(|id| id.len() == 8)
            .ok_or_else(bad)?;
        let key = token_key(&data_encoding::HEXLOWER.encode(&id));
        let secret = hex(&request.secret).ok_or_else(bad)?;
        let stored: Option<Stored> = store::read(self.store.as_ref(), &key)?;
        let stored = stored.ok_or_else(bad)?;
        let hash: [u8; 32] = Sha256::digest(secret).into();
        if bool::from(hash.ct_eq(&stored.hash)) && now() < stored.expires {
            return Ok(key);
        }
        Err(bad())
    }

    /// Makes a member of a node that has a token.
    async fn admit(self: &Arc<Self>, request: &JoinRequest, from: IpAddr) -> Result<Joined> {
        let _changing = self.changing.lock().await;
        let (trust, membership) = self.joined()?;
        Self::authority(&trust, &membership)?;
        let token = self.check_token(request)?;
        let name = &request.name;
        if membership.member(name).is_some() {
            return Err(failure(
                format!("there is a node {name} already"),
                format!("join with another --name, or remove it first: blanket node rm {name}"),
            ));
        }
        let certificate = sign(&trust, &request.request, name)?;
        let identity = Peer::of(&certificate_of(&certificate)?)?;
        let mut membership = Membership::clone(&membership);
        if membership.is_removed(&identity.id) {
            return Err(failure("that key was removed", "join with a new one"));
        }
        let address = request.address.clone();
        let address = address.unwrap_or_else(|| Address::from(SocketAddr::new(from, request.port)));
        // From here on nobody else can use it.
        anyhow::ensure!(self.store.remove(&token)?, "the join token was used");
        membership.add(Member {
            name: name.clone(),
            id: identity.id.clone(),
            address: address.clone(),
        });
        let membership = self.set_membership(membership)?;
        self.audit(
            "joined",
            json!({"name": name, "id": identity.id, "address": address, "from": from}),
        );
        self.tell_members(&membership);
        Ok(Joined {
            certificate,
            ca: self.files.ca_pem()?,
            membership: Membership::clone(&membership),
        })
    }

    /// Joins the cluster that a token is of.
    pub(super) async fn join(
        self: &Arc<Self>,
        token: &Token,
        at: Option<Address>,
        name: NodeName,
        address: Option<Address>,
    ) -> Result<Arc<Membership>> {
        let _changing = self.changing.lock().await;
        self.check_alone()?;
        let port = self.start_listening().await?.port();
        let key = ca::new_key()?;
        let request = JoinRequest {
            id: data_encoding::HEXLOWER.encode(&token.id),
            secret: data_encoding::HEXLOWER.encode(&token.secret),
            name,
            address,
            port,
            request: ca::request(&key)?,
        };
        let at = at.as_ref().unwrap_or(&token.address);
        let who = format!("the CA's node at {at}");
        let config = tls::joining(token.fingerprint)?;
        let tls = super::peer::dial(&who, at, config, tls::ca_server_name()?).await?;
        let asked = http::call(tls, Method::POST, JOIN_PATH, Some(&request));
        let joined: Joined = tokio::time::timeout(JOIN, asked)
            .await
            .with_context(|| format!("{who} does not answer"))??;
        let identity = Identity::read(&joined.ca, &joined.certificate, &key.serialize_pem())?;
        anyhow::ensure!(
            identity.fingerprint() == token.fingerprint && identity.own.name == request.name,
            "{who} has sent a certificate that was not asked for"
        );
        store::write(self.store.as_ref(), MEMBERSHIP, &joined.membership)?;
        let key = key.serialize_pem();
        self.files.keep(&joined.ca, &joined.certificate, &key)?;
        self.set_trust(Some(Trust::new(identity, None)?));
        self.set_membership(joined.membership)
    }

    /// Removes a node: its certificate is no good from now on.
    pub(super) async fn remove(self: &Arc<Self>, name: &NodeName, by: &str) -> Result<()> {
        let _changing = self.changing.lock().await;
        let (trust, membership) = self.joined()?;
        Self::authority(&trust, &membership)?;
        if name == trust.name() {
            return Err(failure(
                "the node with the CA cannot be removed",
                "to end the cluster, remove all others, then blanket node leave",
            ));
        }
        let mut membership = Membership::clone(&membership);
        let until = now() + NODE_LIFE.as_secs();
        let Some(member) = membership.remove(name, now(), until) else {
            let names: Vec<_> = membership
                .members
                .iter()
                .map(|it| it.name.as_str())
                .collect();
            return Err(failure(
                format!("there is no node {name}"),
                format!("the nodes are: {}", names.join(", ")),
            ));
        };
        let membership = self.set_membership(membership)?;
        self.audit("removed", json!({"name": name, "id": member.id, "by": by}));
        self.tell_members(&membership);
        Ok(())
    }

    /// Takes this node out of its cluster.
    pub(super) async fn leave(self: &Arc<Self>) -> Result<()> {
        let _changing = self.changing.lock().await;
        let (trust, membership) = self.joined()?;
        if trust.authority.is_some() && membership.members.len() > 1 {
            return Err(failure(
                "the other nodes need the CA that is on this one",
                "remove them first: blanket node rm NAME",
            ));
        }
        if trust.authority.is_none() {
            let told: Result<()> = self
                .ask_authority(Method::POST, "/leave", None::<&()>)
                .await;
            if let Err(error) = told {
                // It may have been removed there already, or that node be gone.
                tracing::warn!("the CA's node was not told: {error:#}");
            }
        }
        self.audit("left", json!({"name": trust.name()}));
        self.files.forget()?;
        self.store.remove(MEMBERSHIP)?;
        self.set_trust(None);
        self.membership.send_replace(None);
        self.stop_listening().await;
        Ok(())
    }

    /// Signs another certificate for a member's key.
    pub(super) fn renew_for(&self, peer: &Peer, request: &str) -> Result<String> {
        let (trust, membership) = self.joined()?;
        Self::authority(&trust, &membership)?;
        let certificate = sign(&trust, request, &peer.name)?;
        let identity = Peer::of(&certificate_of(&certificate)?)?;
        anyhow::ensure!(identity.id == peer.id, "the request is for another key");
        self.audit("renewed", json!({"name": peer.name, "id": peer.id}));
        Ok(certificate)
    }

    /// Has this node's certificate renewed if its time is almost over at `at`.
    async fn renew(&self, at: SystemTime) -> Result<()> {
        let Some(trust) = self.trust() else {
            return Ok(());
        };
        if !trust.identity.wants_renewal(at) {
            return Ok(());
        }
        let request = &trust.identity.request;
        let (certificate, authority) = match &trust.authority {
            Some(authority) => (
                authority.sign(request, trust.name(), true, NODE_LIFE)?,
                self.files.authority()?,
            ),
            None => {
                let body = Pem {
                    pem: request.clone(),
                };
                let answer: Pem = self
                    .ask_authority(Method::POST, "/renew", Some(&body))
                    .await?;
                (answer.pem, None)
            }
        };
        let _changing = self.changing.lock().await;
        self.files.renew(&certificate)?;
        let identity = self.files.identity()?.context("the certificate is gone")?;
        self.set_trust(Some(Trust::new(identity, authority)?));
        tracing::info!("this node's certificate was renewed");
        Ok(())
    }

    /// Takes over who is in the cluster, if that is news.
    pub(super) async fn learn(&self, membership: Membership) -> Result<()> {
        let _changing = self.changing.lock().await;
        // This node may have left meanwhile, or be in another cluster.
        let (_, known) = self.joined()?;
        if known.authority == membership.authority && known.revision < membership.revision {
            self.set_membership(membership)?;
        }
        Ok(())
    }

    /// Tells all others who is in the cluster. Those that are not reached ask
    /// later.
    fn tell_members(self: &Arc<Self>, membership: &Arc<Membership>) {
        for member in membership.members.clone() {
            if member.name == membership.authority {
                continue;
            }
            let (node, membership) = (Arc::clone(self), Arc::clone(membership));
            tokio::spawn(async move {
                let told: Result<()> = node
                    .ask(&member, Method::PUT, "/members", Some(&*membership))
                    .await;
                if let Err(error) = told {
                    tracing::debug!("node {} was not told: {error:#}", member.name);
                }
            });
        }
    }

    async fn sync(&self) -> Result<()> {
        let (trust, _) = self.joined()?;
        if trust.authority.is_some() {
            return Ok(());
        }
        let membership = self
            .ask_authority(Method::GET, "/members", None::<&()>)
            .await?;
        self.learn(membership).await
    }
}

fn sign(trust: &Trust, request: &str, name: &NodeName) -> Result<String> {
    let authority: &Authority = trust.authority.as_ref().context("the CA is not here")?;
    authority.sign(request, name, false, NODE_LIFE)
}

fn certificate_of(pem: &str) -> Result<rustls::pki_types::CertificateDer<'static>> {
    use rustls::pki_types::pem::PemObject;
    rustls::pki_types::CertificateDer::from_pem_slice(pem.as_bytes()).context("the certificate")
}

/// Keeps this node's certificate and what it knows of the others up to date,
/// for ever.
pub(super) async fn keep_up(node: &Arc<Node>) {
    let mut looked = None::<Instant>;
    let mut in_touch = true;
    loop {
        if looked.is_none_or(|looked| looked.elapsed() >= CERTIFICATES) {
            looked = Some(Instant::now());
            if let Err(error) = node.renew(SystemTime::now()).await {
                tracing::warn!("cannot renew this node's certificate: {error:#}");
            }
        }
        if node.trust().is_some() {
            let synced = node.sync().await;
            match &synced {
                Err(error) if in_touch => tracing::warn!("{error:#}"),
                Ok(()) if !in_touch => tracing::info!("the CA's node answers again"),
                _ => (),
            }
            in_touch = synced.is_ok();
        }
        tokio::time::sleep(SYNC).await;
    }
}

/// The address that others most likely reach this machine at: of the interface
/// with the default route, else of the first one that is up.
pub(crate) fn own_address() -> Result<IpAddr> {
    // Connecting a datagram socket sends nothing; it chooses a route.
    let routed = std::net::UdpSocket::bind("0.0.0.0:0").and_then(|socket| {
        socket.connect("192.0.2.1:9")?;
        socket.local_addr()
    });
    if let Ok(address) = routed
        && !address.ip().is_unspecified()
    {
        return Ok(address.ip());
    }
    let interfaces = blanket_drivers::uplink::interfaces()?;
    let mut addresses = crate::up::usable(interfaces).flat_map(|it| it.addresses);
    addresses.next().ok_or_else(|| {
        failure(
            "this machine has no address that other nodes could reach",
            "name one with --address",
        )
    })
}

/// The fingerprint of the cluster's CA.
pub(super) fn fingerprint(trust: &Trust) -> Fingerprint {
    trust.identity.fingerprint()
}

#[cfg(test)]
impl Node {
    /// Renews the certificate as it would be at another time.
    pub(super) async fn renew_at(&self, at: SystemTime) -> Result<()> {
        self.renew(at).await
    }
}
