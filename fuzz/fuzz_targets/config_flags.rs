//! A VM's command-line flags, one per line: any words are a configuration or
//! an error, and flags laid over nothing stay what they are.
#![no_main]

use blanket_vmm::config::VmConfig;
use clap::Parser;
use libfuzzer_sys::fuzz_target;

#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    config: VmConfig,
}

fuzz_target!(|text: &str| {
    let words = std::iter::once("blanket-vmm").chain(text.lines());
    let Ok(flags) = Flags::try_parse_from(words) else {
        return;
    };
    let _ = flags.config.validate();
    let config = VmConfig::default().overlaid(flags.config.clone());
    assert_eq!(config, flags.config);
});
