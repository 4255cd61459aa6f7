//! The domain's clock.
//!
//! System time is nanoseconds since the domain started, by the time-stamp
//! counter, which guest code reads itself. It stands still while the VM is
//! paused or saved, and goes on from there, here or on another host. The time of
//! day at which it was 0 moves accordingly.

use std::arch::x86_64::_rdtsc;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::abi::{TIME_TSC_STABLE, VcpuTimeInfo};

/// Nanoseconds of a second.
const SECOND: u64 = 1_000_000_000;

/// How ticks become nanoseconds: shifted (to the left if `shift` is positive),
/// times `mul`, by 2^32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Scale {
    mul: u32,
    shift: i8,
}

impl Scale {
    /// For a counter with `hz` ticks a second.
    fn new(hz: u64) -> Self {
        // With a shifted frequency within (1, 2] GHz, `mul` has 32 bits.
        let mut hz = hz.max(1);
        let mut shift = 0;
        while hz > 2 * SECOND {
            hz >>= 1;
            shift -= 1;
        }
        while hz <= SECOND {
            hz <<= 1;
            shift += 1;
        }
        // Below 2^32, as hz exceeds a second's nanoseconds.
        let mul = ((u128::from(SECOND) << 32) / u128::from(hz)) as u32;
        Self { mul, shift }
    }

    /// Exactly as guests do it (`__pvclock_read_cycles`).
    fn nanoseconds(self, ticks: u64) -> u64 {
        let ticks = if self.shift < 0 {
            ticks >> -self.shift
        } else {
            ticks << self.shift
        };
        ((u128::from(ticks) * u128::from(self.mul)) >> 32) as u64
    }

    /// The least ticks that are `nanoseconds`, at most `u64::MAX`.
    fn ticks(self, nanoseconds: u64) -> u64 {
        let shifted = (u128::from(nanoseconds) << 32).div_ceil(u128::from(self.mul));
        let ticks = if self.shift < 0 {
            shifted << -self.shift
        } else {
            shifted.div_ceil(1 << self.shift)
        };
        u64::try_from(ticks).unwrap_or(u64::MAX)
    }
}

/// A moment at which both clocks are known.
#[derive(Clone, Copy, Debug)]
struct Base {
    tsc: u64,
    system: u64,
    /// System time stands still.
    held: bool,
    /// Changes with the others; even.
    version: u32,
}

/// The clock as it is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedTime {
    system: u64,
    version: u32,
    hz: u64,
}

/// A saved clock cannot go on here.
#[derive(Debug, thiserror::Error)]
#[error(
    "the saved guest's time-stamp counter has {saved} ticks a second, this host's {here}; restore it on a host with the same processor"
)]
pub struct OtherFrequency {
    /// Of the saved guest.
    pub saved: u64,
    /// Of this host.
    pub here: u64,
}

/// The clock of a domain.
pub struct Time {
    hz: u64,
    scale: Scale,
    base: Mutex<Base>,
}

impl Time {
    /// Starts at 0, with a time-stamp counter of `hz` ticks a second.
    #[must_use]
    pub fn new(hz: u64) -> Self {
        Self {
            hz,
            scale: Scale::new(hz),
            base: Mutex::new(Base {
                tsc: ticks(),
                system: 0,
                held: false,
                version: 2,
            }),
        }
    }

    /// System time, in nanoseconds.
    #[must_use]
    pub fn now(&self) -> u64 {
        let base = *self.base();
        if base.held {
            return base.system;
        }
        let passed = ticks().saturating_sub(base.tsc);
        base.system.saturating_add(self.scale.nanoseconds(passed))
    }

    /// What the time-stamp counter shows when system time gets to `system`. Not
    /// exact in the past, and never reached if the clock stops before.
    #[must_use]
    pub fn tsc_at(&self, system: u64) -> u64 {
        let base = *self.base();
        let wait = system.saturating_sub(base.system);
        base.tsc.saturating_add(self.scale.ticks(wait))
    }

    /// What vCPUs are told about it. It stays true until [`Time::resume`] or
    /// [`Time::restore`].
    #[must_use]
    pub fn info(&self) -> VcpuTimeInfo {
        let base = *self.base();
        VcpuTimeInfo {
            version: base.version,
            tsc_timestamp: base.tsc,
            system_time: base.system,
            tsc_to_system_mul: self.scale.mul,
            tsc_shift: self.scale.shift,
            flags: TIME_TSC_STABLE,
            ..Default::default()
        }
    }

    /// The time of day at system time 0: seconds since 1970, and nanoseconds.
    #[must_use]
    pub fn wall(&self) -> (u64, u32) {
        let day = SystemTime::now().duration_since(UNIX_EPOCH);
        let start = day
            .unwrap_or_default()
            .saturating_sub(Duration::from_nanos(self.now()));
        (start.as_secs(), start.subsec_nanos())
    }

    /// Stops the clock. No vCPU may run meanwhile.
    pub fn pause(&self) {
        let now = self.now();
        let mut base = self.base();
        base.system = now;
        base.held = true;
    }

    /// Lets the clock go on. All vCPUs need [`Time::info`] before they run.
    pub fn resume(&self) {
        let mut base = self.base();
        if base.held {
            base.tsc = ticks();
            base.held = false;
            base.version = base.version.wrapping_add(2);
        }
    }

    /// Starts at 0 again, for a guest that starts anew.
    pub fn restart(&self) {
        let mut base = self.base();
        *base = Base {
            tsc: ticks(),
            system: 0,
            held: base.held,
            version: base.version.wrapping_add(2),
        };
    }

    /// The clock of a paused VM as it is saved.
    #[must_use]
    pub fn save(&self) -> SavedTime {
        SavedTime {
            system: self.now(),
            version: self.base().version,
            hz: self.hz,
        }
    }

    /// Whether a saved clock can go on here.
    ///
    /// # Errors
    /// The time-stamp counter has another frequency: the guest has measured its
    /// delay loops with it.
    pub fn fits(&self, saved: &SavedTime) -> Result<(), OtherFrequency> {
        // Hosts of one kind differ by as much as they measure their own wrongly.
        const TOLERANCE: u64 = 1000;
        if saved.hz.abs_diff(self.hz) > self.hz / TOLERANCE {
            return Err(OtherFrequency {
                saved: saved.hz,
                here: self.hz,
            });
        }
        Ok(())
    }

    /// Takes over a saved clock, which stands still until [`Time::resume`].
    ///
    /// # Errors
    /// It does not fit ([`Time::fits`]).
    pub fn restore(&self, saved: &SavedTime) -> Result<(), OtherFrequency> {
        self.fits(saved)?;
        *self.base() = Base {
            tsc: ticks(),
            system: saved.system,
            held: true,
            version: saved.version & !1,
        };
        Ok(())
    }

    fn base(&self) -> MutexGuard<'_, Base> {
        self.base.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The time-stamp counter.
fn ticks() -> u64 {
    // SAFETY: every x86-64 processor has it, and Linux leaves it to programs.
    unsafe { _rdtsc() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// System time of a moment by what a vCPU is told.
    fn read(info: &VcpuTimeInfo, tsc: u64) -> u64 {
        let scale = Scale {
            mul: info.tsc_to_system_mul,
            shift: info.tsc_shift,
        };
        info.system_time + scale.nanoseconds(tsc - info.tsc_timestamp)
    }

    const HZ: u64 = 2_596_100_000;

    #[test]
    fn guest_and_hypervisor_agree_on_the_time() {
        let time = Time::new(HZ);
        let info = time.info();
        let before = time.now();
        let guest = read(&info, ticks());
        let after = time.now();
        assert!(
            before <= guest && guest <= after,
            "{before} {guest} {after}"
        );
        assert_eq!((info.version % 2, info.flags), (0, TIME_TSC_STABLE));
    }

    #[test]
    fn the_clock_stands_still_while_paused_and_goes_on_from_there() {
        let time = Time::new(HZ);
        let version = time.info().version;
        time.pause();
        let held = time.now();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(time.now(), held);
        time.pause();
        let wall = time.wall();
        time.resume();
        let info = time.info();
        assert_ne!(info.version, version, "readers must notice");
        assert_eq!(info.system_time, held);
        assert!(time.now() >= held);
        // The pause is part of the time of day.
        assert!(time.wall() >= wall);
    }

    #[test]
    fn a_saved_clock_goes_on_where_it_was() {
        let time = Time::new(HZ);
        std::thread::sleep(Duration::from_millis(5));
        time.pause();
        let saved = time.save();
        let other = Time::new(HZ + 1000);
        other.restore(&saved).unwrap();
        assert_eq!(other.now(), time.now());
        other.resume();
        assert!(other.now() >= time.now());
        assert_ne!(other.info().version, time.info().version);
        let slow = Time::new(2 * HZ);
        let error = slow.restore(&saved).unwrap_err();
        assert!(error.to_string().contains("same processor"));
        other.restart();
        assert!(other.now() < SECOND && other.info().system_time == 0);
    }

    #[test]
    fn the_time_of_day_is_that_of_the_host() {
        let time = Time::new(HZ);
        let (seconds, nanoseconds) = time.wall();
        let start = Duration::new(seconds, nanoseconds) + Duration::from_nanos(time.now());
        let day = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        assert!(day.abs_diff(start) < Duration::from_secs(60));
    }

    proptest! {
        #[test]
        fn a_second_has_as_many_nanoseconds_as_ticks_say(hz in 1_000_000u64..20_000_000_000) {
            let scale = Scale::new(hz);
            for seconds in [1u64, 60, 86_400 * 365] {
                let Some(ticks) = hz.checked_mul(seconds) else { continue };
                let error = scale.nanoseconds(ticks).abs_diff(seconds * SECOND);
                // 2^-31 of it, and what a shift to the right cuts off.
                prop_assert!(error <= seconds + 16, "{hz} {seconds}: {error}");
            }
        }

        #[test]
        fn a_deadline_is_reached_at_its_tick_and_not_before(
            hz in 100_000_000u64..20_000_000_000,
            wait in 1u64..(1 << 55),
        ) {
            let scale = Scale::new(hz);
            let ticks = scale.ticks(wait);
            prop_assert!(scale.nanoseconds(ticks) >= wait);
            prop_assert!(scale.nanoseconds(ticks - 1) < wait);
        }

        #[test]
        fn no_deadline_overflows(hz: u64, deadline: u64) {
            let time = Time::new(hz);
            prop_assert!(time.tsc_at(deadline) >= time.info().tsc_timestamp);
            let _ = time.now();
        }
    }
}
