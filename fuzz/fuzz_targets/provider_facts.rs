//! What a machine shows of its provider: SMBIOS, Xen and PCI files and CPUID
//! leaves with any content are told or not, and the same each time.
#![no_main]

use arbitrary::Arbitrary;
use blanket_drivers::provider::{Facts, PROVIDERS, SMBIOS_FIELDS, Source, report_of};
use libfuzzer_sys::fuzz_target;

/// The longest text that is kept, in characters.
const LONGEST: usize = 256;

#[derive(Arbitrary, Debug)]
struct Input {
    files: Vec<(Place, Content)>,
    /// The leaf with the hypervisor bit, and those of hypervisors.
    leaves: Option<([u32; 4], [Leaf; 16])>,
}

#[derive(Arbitrary, Debug)]
enum Place {
    Smbios(u8),
    Xen(u8),
    Pci,
}

#[derive(Arbitrary, Debug)]
enum Content {
    Any(Vec<u8>),
    /// What some provider's machines show.
    Known(u8),
    /// The same with more around it.
    Around(Vec<u8>, u8, Vec<u8>),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Leaf {
    Any([u32; 4]),
    Known(u8),
}

const XEN_FACTS: [&str; 7] = [
    "type",
    "uuid",
    "guest_type",
    "version_extra",
    "features",
    "proc",
    "capabilities",
];

const KNOWN: [&str; 24] = [
    "Amazon EC2",
    "4.11.amazon",
    "ec2e1916-9099-7caf-fd21-012345abcdef",
    "i-0af01c0123456789a",
    "Google Compute Engine",
    "GoogleCloud-0123456789ABCDEF",
    "7783-7084-3265-9085-8269-3286-77",
    "Microsoft Corporation",
    "OpenStack Nova",
    "OpenStack Foundation",
    "DigitalOcean",
    "Hetzner",
    "VMware, Inc.",
    "VMware-42",
    "Xen",
    "xen",
    "PV",
    "PVH",
    "HVM",
    "control_d",
    "00000705",
    "yes",
    "1d0f:ec20",
    "\u{e4}\u{202e}\u{0}",
];

const SIGNATURES: [&[u8; 12]; 5] = [
    b"KVMKVMKVM\0\0\0",
    b"XenVMMXenVMM",
    b"Microsoft Hv",
    b"VMwareVMware",
    b"TCGTCGTCGTCG",
];

fn pick<T: Copy>(from: &[T], at: u8) -> T {
    from[usize::from(at) % from.len()]
}

fn add_file(facts: &mut Facts, place: &Place, content: &Content) {
    let (source, name) = match place {
        Place::Smbios(at) => (Source::Smbios, pick(SMBIOS_FIELDS, *at)),
        Place::Xen(at) => (Source::Xen, pick(&XEN_FACTS, *at)),
        Place::Pci => (Source::Pci, "device"),
    };
    let known = |at: &u8| pick(&KNOWN, *at).as_bytes();
    match content {
        Content::Any(bytes) => facts.add(source, name, bytes),
        Content::Known(at) => facts.add(source, name, known(at)),
        Content::Around(before, at, behind) => {
            let bytes = [before.as_slice(), known(at), behind].concat();
            facts.add(source, name, &bytes);
        }
    }
}

fn leaf(at: u32, leaf: Leaf) -> [u32; 4] {
    match leaf {
        Leaf::Any(registers) => registers,
        Leaf::Known(which) => {
            let text = pick(&SIGNATURES, which);
            let word = |n| u32::from_le_bytes([text[n], text[n + 1], text[n + 2], text[n + 3]]);
            [at, word(0), word(4), word(8)]
        }
    }
}

fuzz_target!(|input: Input| {
    let mut facts = Facts::default();
    for (place, content) in &input.files {
        add_file(&mut facts, place, content);
    }
    if let Some((one, leaves)) = input.leaves {
        facts.add_cpuid(&|at| match at {
            1 => one,
            _ => leaf(at, leaves[(at >> 8) as usize % leaves.len()]),
        });
    }
    for fact in facts.iter() {
        assert!(!fact.value.is_empty() && fact.value.chars().count() <= LONGEST);
        assert!(!fact.value.chars().any(char::is_control), "{fact:?}");
    }
    let report = report_of(facts.clone());
    let known = PROVIDERS.iter().any(|known| known.name == report.provider);
    assert!(known || report.provider == "unknown");
    // Whoever it is, there is a reason.
    assert_eq!(known, !report.evidence.is_empty());
    let seen = |fact| facts.iter().any(|other| other == fact);
    assert!(report.evidence.iter().all(seen));
    assert!(report.notices.is_empty());
    assert_eq!(report_of(facts), report);
});
