//! Who gets which connections.

use std::collections::HashSet;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::frame::{Key, Mac};

/// A server behind a service's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Backend {
    /// Its address, in the service's network.
    pub mac: Mac,
    /// Its share of connections, compared with others'. 0: no new ones.
    #[serde(default = "one")]
    pub weight: u32,
}

fn one() -> u32 {
    1
}

/// A service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServiceConfig {
    /// The address that stations send its packets to, which no station has.
    pub mac: Mac,
    /// Its servers.
    pub backends: Vec<Backend>,
    /// Tokens: a power of two, at least ten times as many as servers.
    #[serde(default = "tokens")]
    pub tokens: u32,
    /// All connections of a client go to one server.
    #[serde(default)]
    pub sticky: bool,
    /// How long connections stay with servers that get no new ones.
    #[serde(default = "drain")]
    pub drain: Duration,
}

fn tokens() -> u32 {
    16_384
}

fn drain() -> Duration {
    Duration::from_secs(300)
}

/// A service that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ServiceError {
    /// The number of tokens.
    #[error("tokens: a power of two from 64 to 1048576")]
    Tokens,
    /// Too few tokens.
    #[error("too few tokens: at least ten for each backend")]
    Few,
    /// The same server twice, or one that is none.
    #[error("{0} is there twice, or is no station's address")]
    Backend(Mac),
    /// Too many services.
    #[error("too many services: remove some")]
    TooMany,
}

/// Where a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The server.
    pub backend: Mac,
    /// The one whose connections are still to be sent on to it.
    pub before: Option<Mac>,
}

const NOBODY: u16 = u16::MAX;

/// A service, ready for packets.
#[derive(Clone, Debug)]
pub struct Service {
    config: ServiceConfig,
    sick: HashSet<Mac>,
    /// Whose each token is: a place in `servers`.
    tokens: Vec<u16>,
    /// Whose it was before, until then.
    before: Vec<(u16, Duration)>,
    /// Those of the configuration, and those of before.
    servers: Vec<Mac>,
}

/// A hash that is the same on all nodes (the finalizer of splitmix64).
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn number(mac: Mac) -> u64 {
    let [a, b, c, d, e, f] = mac.0;
    u64::from_be_bytes([0, 0, a, b, c, d, e, f])
}

/// Natural logarithm of `bits / 2^64`, with operations only that give the same
/// bits on every machine.
fn ln(bits: u64) -> f64 {
    let bits = bits | 1;
    let exponent = 63 - bits.leading_zeros();
    // 1 <= x < 2
    let x = (bits as f64) / ((1_u64 << exponent) as f64);
    let t = (x - 1.0) / (x + 1.0);
    let (mut sum, mut power) = (0.0, t);
    for odd in (1..24).step_by(2) {
        sum += power / f64::from(odd);
        power *= t * t;
    }
    2.0 * sum + (f64::from(exponent) - 64.0) * std::f64::consts::LN_2
}

/// Which of `backends` has this token: each draws a number, of an exponential
/// distribution with its weight as the rate, and the smallest wins.
fn owner(token: u32, backends: &[(Mac, u32)]) -> Option<usize> {
    let draw = |(mac, weight): &(Mac, u32)| {
        let bits = mix(mix(number(*mac)) ^ mix(u64::from(token) | 1 << 63));
        -ln(bits) / f64::from(*weight)
    };
    let draws = backends.iter().map(draw).enumerate();
    let least = draws.reduce(|a, b| if b.1 < a.1 { b } else { a });
    least.map(|(at, _)| at)
}

impl Service {
    /// Sets it up.
    ///
    /// # Errors
    ///
    /// See [`ServiceError`].
    pub fn new(config: ServiceConfig) -> Result<Self, ServiceError> {
        check(&config)?;
        let mut service = Self {
            tokens: vec![NOBODY; config.tokens as usize],
            before: vec![(NOBODY, Duration::ZERO); config.tokens as usize],
            sick: HashSet::new(),
            servers: Vec::new(),
            config,
        };
        service.assign(Duration::ZERO);
        Ok(service)
    }

    /// Changes it.
    ///
    /// # Errors
    ///
    /// See [`ServiceError`]; nothing changed.
    pub fn set(&mut self, now: Duration, config: ServiceConfig) -> Result<(), ServiceError> {
        check(&config)?;
        if config.tokens != self.config.tokens {
            *self = Self::new(config)?;
            return Ok(());
        }
        self.config = config;
        let backends = &self.config.backends;
        self.sick
            .retain(|mac| backends.iter().any(|backend| backend.mac == *mac));
        self.assign(now);
        Ok(())
    }

    /// A server answers, or does not: then it gets nothing at all.
    pub fn set_health(&mut self, now: Duration, backend: Mac, healthy: bool) {
        let known = self.config.backends.iter().any(|it| it.mac == backend);
        let changed = match healthy {
            true => self.sick.remove(&backend),
            false => known && self.sick.insert(backend),
        };
        if changed {
            self.assign(now);
        }
    }

    /// Its configuration.
    #[must_use]
    pub fn config(&self) -> &ServiceConfig {
        &self.config
    }

    /// Gives each token to whom it belongs.
    fn assign(&mut self, now: Duration) {
        let fit = |backend: &&Backend| backend.weight > 0 && !self.sick.contains(&backend.mac);
        let backends = self.config.backends.iter().filter(fit);
        let live: Vec<(Mac, u32)> = backends.map(|it| (it.mac, it.weight)).collect();
        // Those who keep old connections have a place too.
        let mut servers: Vec<Mac> = live.iter().map(|(mac, _)| *mac).collect();
        let old = std::mem::take(&mut self.servers);
        let sick = &self.sick;
        let mut keep = |at: u16| {
            let mac = *old.get(usize::from(at))?;
            if sick.contains(&mac) {
                return None;
            }
            let place = servers.iter().position(|other| *other == mac);
            let place = place.unwrap_or_else(|| {
                servers.push(mac);
                servers.len() - 1
            });
            u16::try_from(place).ok()
        };
        let until = now + self.config.drain;
        let tokens = self.tokens.iter_mut().zip(&mut self.before).zip(0..);
        for ((token, before), number) in tokens {
            let was = keep(*token);
            let is = owner(number, &live).and_then(|at| u16::try_from(at).ok());
            if was != is && was.is_some() {
                *before = (was.unwrap_or(NOBODY), until);
            } else if before.1 > now {
                before.0 = keep(before.0).unwrap_or(NOBODY);
            } else {
                *before = (NOBODY, Duration::ZERO);
            }
            *token = is.unwrap_or(NOBODY);
        }
        self.servers = servers;
    }

    /// The server of a packet; `None`: there is none.
    #[must_use]
    pub fn choose(&self, now: Duration, key: &Key) -> Option<Choice> {
        let token = self.token(key)?;
        let server = |at: u16| self.servers.get(usize::from(at)).copied();
        let (before, until) = self.before[token];
        let before = server(before).filter(|_| now < until);
        match server(self.tokens[token]) {
            Some(backend) => Some(Choice { backend, before }),
            // Nobody takes new ones; old ones go on.
            None => before.map(|backend| Choice {
                backend,
                before: None,
            }),
        }
    }

    fn token(&self, key: &Key) -> Option<usize> {
        let (from, to) = key.ip?;
        let (source, port) = key.ports?;
        let ip = |ip| match ip {
            std::net::IpAddr::V4(ip) => u128::from(u32::from(ip)),
            std::net::IpAddr::V6(ip) => u128::from(ip),
        };
        let mut hash = u64::from(key.protocol) << 32 | u64::from(port);
        if !self.config.sticky {
            hash |= u64::from(source) << 16;
        }
        for half in [ip(from), ip(to)] {
            hash = mix(hash ^ (half >> 64) as u64);
            hash = mix(hash.rotate_left(17) ^ half as u64);
        }
        let tokens = self.tokens.len() as u128;
        Some(((u128::from(hash) * tokens) >> 64) as usize)
    }

    /// How many tokens each server has.
    #[must_use]
    pub fn shares(&self) -> Vec<(Mac, usize)> {
        let of = |(at, mac): (usize, &Mac)| {
            let has = |token: &&u16| usize::from(**token) == at;
            (*mac, self.tokens.iter().filter(has).count())
        };
        self.servers.iter().enumerate().map(of).collect()
    }
}

fn check(config: &ServiceConfig) -> Result<(), ServiceError> {
    if !config.tokens.is_power_of_two() || !(64..=1 << 20).contains(&config.tokens) {
        return Err(ServiceError::Tokens);
    }
    if config.backends.len() * 10 > config.tokens as usize || config.backends.len() > 4096 {
        return Err(ServiceError::Few);
    }
    let mut seen = HashSet::new();
    for backend in &config.backends {
        if !backend.mac.is_station() || !seen.insert(backend.mac) {
            return Err(ServiceError::Backend(backend.mac));
        }
    }
    Ok(())
}
