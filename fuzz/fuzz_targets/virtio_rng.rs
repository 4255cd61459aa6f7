//! virtio-rng's queue: no ring, chain or reset hurts the device, and a driver
//! that behaves gets its entropy afterwards.
#![no_main]

use blanket_devices::virtio::rng::Rng;
use blanket_fuzz::bench::Bench;
use blanket_fuzz::guest::Session;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|session: Session| {
    let mut device = Rng::new("rng0");
    let mut bench = Bench::new(&mut device);
    bench.run(&session, |_| {});
    bench.behave(session.features);
    let (len, bytes) = bench.ask(0, &[], &[16, 16]);
    assert_eq!(len, 32);
    assert_ne!(bytes, [0; 32]);
    bench.finish();
});
