//! Which of a provider's volumes are which.

use std::fmt;

use serde::Serialize;

use super::identify::Test;

/// What becomes of a volume's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// In the machine that the instance runs on: fast, and gone with the
    /// instance.
    InstanceStore,
    /// Reached over the provider's network: stays when the instance goes.
    Network,
    /// The machine's own disk.
    Local,
    /// That cannot be told.
    Unknown,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::InstanceStore => "instance store",
            Self::Network => "network volume",
            Self::Local => "local disk",
            Self::Unknown => "unknown",
        })
    }
}

/// What a volume shows of its provider.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskFacts {
    /// What it calls itself.
    pub model: Option<String>,
    /// Its maker.
    pub vendor: Option<String>,
    /// Where it is plugged in: its folder below `/sys/devices`.
    pub path: Option<String>,
}

/// Which of the facts a mark is about.
#[derive(Clone, Copy, Debug)]
pub(super) enum Field {
    Model,
    Vendor,
    Path,
}

/// Something that tells volumes of one place.
#[derive(Debug)]
pub(super) struct DiskMark {
    field: Field,
    test: Test,
    place: Place,
}

/// A volume whose `field` passes is in `place`.
pub(super) const fn disk(field: Field, test: Test, place: Place) -> DiskMark {
    DiskMark { field, test, place }
}

impl DiskFacts {
    fn get(&self, field: Field) -> Option<(&'static str, &str)> {
        let (name, value) = match field {
            Field::Model => ("model", &self.model),
            Field::Vendor => ("vendor", &self.vendor),
            Field::Path => ("path", &self.path),
        };
        value.as_deref().map(|value| (name, value))
    }
}

/// Where a volume of the provider of this name is, and what tells that.
#[must_use]
pub fn place(provider: &str, facts: &DiskFacts) -> (Place, String) {
    let known = super::PROVIDERS.iter().find(|it| it.name == provider);
    let marks = known.map_or(&[][..], |it| it.disks);
    let found = marks.iter().find_map(|mark| {
        let (name, value) = facts.get(mark.field)?;
        let told = format!("{name} {value}");
        mark.test.holds(value).then_some((mark.place, told))
    });
    found.unwrap_or_else(|| (Place::Unknown, "nothing that it shows tells".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(model: &str, vendor: &str, path: &str) -> DiskFacts {
        let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        DiskFacts {
            model: text(model),
            vendor: text(vendor),
            path: text(path),
        }
    }

    #[test]
    fn each_clouds_volumes_are_told_apart() {
        use Place::{InstanceStore, Local, Network, Unknown};
        let vmbus = "/devices/LNXSYSTM:00/VMBUS:00/";
        for (provider, model, vendor, path, expected) in [
            (
                "ec2",
                "Amazon EC2 NVMe Instance Storage",
                "",
                "",
                InstanceStore,
            ),
            ("ec2", "Amazon Elastic Block Store", "", "", Network),
            ("ec2", "", "", "/devices/vbd-51712", Unknown),
            ("gce", "nvme_card", "", "", InstanceStore),
            ("gce", "nvme_card7", "", "", InstanceStore),
            ("gce", "nvme_card-pd", "", "", Network),
            ("gce", "EphemeralDisk", "Google", "", InstanceStore),
            ("gce", "PersistentDisk", "Google", "", Network),
            (
                "azure",
                "Microsoft NVMe Direct Disk v2",
                "",
                "",
                InstanceStore,
            ),
            ("azure", "MSFT NVMe Accelerator v1.0", "", "", Network),
            (
                "azure",
                "Virtual Disk",
                "Msft",
                &format!("{vmbus}00000000-0001-8899-0000-000000000000/host1/target1:0:1/1:0:1:0"),
                InstanceStore,
            ),
            (
                "azure",
                "Virtual Disk",
                "Msft",
                &format!("{vmbus}f8b3781a-1e82-4818-a1c3-63d806ec15bb/host0/target0:0:0/0:0:0:1"),
                InstanceStore,
            ),
            (
                "azure",
                "Virtual Disk",
                "Msft",
                &format!("{vmbus}f8b3781a-1e82-4818-a1c3-63d806ec15bb/host0/target0:0:0/0:0:0:0"),
                Network,
            ),
            ("digitalocean", "Volume", "DO", "", Network),
            ("hetzner", "Volume", "HC", "", Network),
            ("bare-metal", "Samsung SSD", "", "", Local),
            (
                "bare-metal",
                "LUN",
                "",
                "/devices/platform/host2/session1/target2:0:0/2:0:0:0",
                Network,
            ),
            ("vmware", "Virtual disk", "VMware", "", Unknown),
            ("nobody", "Disk", "", "", Unknown),
        ] {
            let (found, told) = place(provider, &facts(model, vendor, path));
            assert_eq!(found, expected, "{provider} {model} {path}: {told}");
        }
    }
}
