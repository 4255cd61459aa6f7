//! Which machine a guest gets, and where it speaks.

use std::path::Path;

use blanket_drivers::probe::Virtualization;
use blanket_vmm::config::{CharConfig, MachineChoice, VmConfig};

/// Settles the choice where it is left to us; returns what was chosen and why then.
pub(crate) fn choose(config: &mut VmConfig, kvm: Virtualization) -> Option<String> {
    if config.machine.unwrap_or_default() != MachineChoice::Auto {
        return None;
    }
    let (choice, name) = if kvm.is_hardware() {
        (MachineChoice::Hvm, "hvm")
    } else {
        (MachineChoice::Pv, "pv")
    };
    config.machine = Some(choice);
    Some(format!("{name} machine, because this node has {kvm}"))
}

/// The machine's name; none if the configuration leaves it open.
pub(crate) fn name(config: &VmConfig) -> Option<&'static str> {
    match config.machine? {
        MachineChoice::Auto => None,
        MachineChoice::Hvm => Some("hvm"),
        MachineChoice::Pv => Some("pv"),
    }
}

/// A port that a guest speaks on.
pub(crate) struct Port<'a> {
    /// What users call it.
    pub(crate) name: &'static str,
    config: Option<&'a CharConfig>,
}

impl<'a> Port<'a> {
    /// The serial port ttyS0.
    pub(crate) fn serial(config: &'a VmConfig) -> Self {
        Self {
            name: "serial port",
            config: config.serial.as_ref(),
        }
    }

    /// The paravirtual console hvc0.
    pub(crate) fn hvc(config: &'a VmConfig) -> Self {
        Self {
            name: "console hvc0",
            config: config.console.as_ref(),
        }
    }

    /// Its socket, if it has one.
    pub(crate) fn socket(&self) -> Option<&'a Path> {
        self.config.and_then(|port| port.socket.as_deref())
    }

    /// Its log, if it has one.
    pub(crate) fn log(&self) -> Option<&'a Path> {
        self.config.and_then(|port| port.log.as_deref())
    }
}

/// The port that is the guest's system console unless its command line names another.
pub(crate) fn console(config: &VmConfig) -> Port<'_> {
    if config.machine == Some(MachineChoice::Pv) {
        Port::hvc(config)
    } else {
        Port::serial(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(machine: Option<MachineChoice>) -> VmConfig {
        VmConfig {
            machine,
            ..VmConfig::default()
        }
    }

    #[test]
    fn hardware_gets_hvm_and_its_lack_pv_with_the_reason() {
        for (kvm, chosen) in [
            (Virtualization::Svm, "hvm"),
            (Virtualization::Vmx, "hvm"),
            (Virtualization::Pvm, "pv"),
        ] {
            for left_open in [None, Some(MachineChoice::Auto)] {
                let mut config = config(left_open);
                let why = choose(&mut config, kvm).unwrap();
                assert_eq!(name(&config), Some(chosen));
                assert!(why.starts_with(chosen) && why.contains("KVM"), "{why}");
            }
        }
    }

    #[test]
    fn a_stated_choice_stays_and_needs_no_reason() {
        for stated in [MachineChoice::Hvm, MachineChoice::Pv] {
            let mut config = config(Some(stated));
            assert_eq!(choose(&mut config, Virtualization::Pvm), None);
            assert_eq!(config.machine, Some(stated));
        }
    }

    #[test]
    fn each_machine_speaks_on_its_own_port() {
        let port = |name: &str| {
            Some(CharConfig {
                socket: Some(name.into()),
                ..CharConfig::default()
            })
        };
        for (machine, expected) in [
            (None, "serial"),
            (Some(MachineChoice::Hvm), "serial"),
            (Some(MachineChoice::Pv), "hvc"),
        ] {
            let config = VmConfig {
                serial: port("serial"),
                console: port("hvc"),
                ..config(machine)
            };
            assert_eq!(console(&config).socket(), Some(Path::new(expected)));
        }
    }
}
