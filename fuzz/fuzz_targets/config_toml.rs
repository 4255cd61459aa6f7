//! A VM's TOML file: any text is a configuration or an error, and what is a
//! configuration stays the same when it is written and read again.
#![no_main]

use blanket_vmm::config::VmConfig;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(config) = toml::from_str::<VmConfig>(text) else {
        return;
    };
    // Valid or not, it must tell without a panic.
    let valid = config.validate().is_ok();
    let written = toml::to_string(&config).expect("a configuration can be written");
    let read: VmConfig = toml::from_str(&written).expect("what was written can be read");
    assert_eq!(read, config);
    assert_eq!(read.validate().is_ok(), valid);
});
