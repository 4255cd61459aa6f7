//! How often an address may try to join.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

/// So many attempts at once,
const BURST: u32 = 10;

/// and one more each time so long has passed.
const INTERVAL: Duration = Duration::from_secs(6);

/// So many addresses are remembered.
const MAX_ADDRESSES: usize = 1024;

/// Counts attempts by address; for IPv6, by the network of 64 bits.
#[derive(Debug, Default)]
pub(super) struct Limiter(HashMap<IpAddr, (u32, Instant)>);

impl Limiter {
    /// Whether an attempt is within the limit. It counts if it is.
    pub(super) fn allows(&mut self, from: IpAddr, now: Instant) -> bool {
        let from = match from.to_canonical() {
            IpAddr::V6(address) => {
                let network = u128::from(address) >> 64 << 64;
                IpAddr::V6(Ipv6Addr::from(network))
            }
            v4 => v4,
        };
        if self.0.len() >= MAX_ADDRESSES && !self.0.contains_key(&from) {
            self.0
                .retain(|_, (used, since)| left(*used, *since, now) > 0);
            if self.0.len() >= MAX_ADDRESSES {
                return false;
            }
        }
        let (used, since) = self.0.entry(from).or_insert((0, now));
        let still = left(*used, *since, now);
        if still < *used {
            (*used, *since) = (still, now);
        }
        if *used >= BURST {
            return false;
        }
        *used += 1;
        true
    }
}

/// How many of the attempts count still.
fn left(used: u32, since: Instant, now: Instant) -> u32 {
    let passed = now.saturating_duration_since(since).as_secs() / INTERVAL.as_secs();
    used.saturating_sub(u32::try_from(passed).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_may_try_a_few_times_and_then_now_and_then() {
        let mut limiter = Limiter::default();
        let start = Instant::now();
        let (a, b) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        for _ in 0..BURST {
            assert!(limiter.allows(a, start));
        }
        assert!(!limiter.allows(a, start));
        assert!(limiter.allows(b, start));
        assert!(!limiter.allows(a, start + INTERVAL / 2));
        assert!(limiter.allows(a, start + INTERVAL));
        assert!(!limiter.allows(a, start + INTERVAL));
        let mapped = "::ffff:10.0.0.1".parse().unwrap();
        assert!(!limiter.allows(mapped, start + INTERVAL));
    }

    #[test]
    fn one_ipv6_network_is_one_and_memory_is_bounded() {
        let mut limiter = Limiter::default();
        let start = Instant::now();
        let address =
            |net: u128, host: u128| IpAddr::V6(Ipv6Addr::from(0xfd00 << 112 | net << 64 | host));
        let mut allowed = (0..100).filter(|host| limiter.allows(address(0, *host), start));
        assert_eq!(allowed.by_ref().count(), 10);
        drop(allowed);
        for net in 1..5000 {
            limiter.allows(address(net, 0), start);
        }
        assert_eq!(limiter.0.len(), MAX_ADDRESSES);
        assert!(limiter.allows(address(9999, 0), start + INTERVAL));
    }
}
