use super::*;
use proptest::prelude::*;

fn vendor_leaf(name: &[u8; 12]) -> Registers {
    let word = |i: usize| u32::from_le_bytes([name[i], name[i + 1], name[i + 2], name[i + 3]]);
    [0x1f, word(0), word(8), word(4)]
}

const AMD: &[u8; 12] = b"AuthenticAMD";
const INTEL: &[u8; 12] = b"GenuineIntel";

/// A processor with every feature but those named, and with `noise` in all other bits.
fn processor(vendor: &[u8; 12], without: &[&str], noise: u32) -> Vec<kvm_cpuid_entry2> {
    let mut leaves = Leaves::default();
    for function in (0..0x20)
        .chain(0x4000_0000..0x4000_0002)
        .chain(0x8000_0000..0x8000_0022)
    {
        if matches!(function, 4 | 7 | 0xb | 0xd) {
            for index in 0..8 {
                leaves.set_indexed(function, index, [noise; 4]);
            }
        } else {
            leaves.set(function, [noise; 4]);
        }
    }
    leaves.set(0, vendor_leaf(vendor));
    for (part, size, offset) in [(2, 256, 576), (5, 64, 832), (6, 512, 896), (7, 1024, 1408)] {
        leaves.set_indexed(0xd, part, [size, offset, 0, 0]);
    }
    for feature in ALL {
        let word = leaves.word(feature.word);
        *word &= !(1 << feature.bit);
        if !without.contains(&feature.name) {
            *word |= 1 << feature.bit;
        }
    }
    leaves.entries()
}

fn text(cpuid: &[kvm_cpuid_entry2], functions: std::ops::RangeInclusive<u32>) -> String {
    let words = functions.flat_map(|function| ask(cpuid, function, 0));
    let bytes: Vec<_> = words.flat_map(u32::to_le_bytes).collect();
    String::from_utf8(bytes)
        .unwrap()
        .trim_end_matches('\0')
        .to_owned()
}

#[test]
fn the_best_level_that_is_everywhere_is_taken_and_a_lesser_one_with_the_reason() {
    let choose = |without: &[&str]| {
        let shown = Shown::choose(CpuChoice::Auto, &processor(AMD, without, 0), false).unwrap();
        (shown.settled(), shown.why.map(|why| why.to_string()))
    };
    assert_eq!(choose(&[]), (CpuChoice::V3, None));
    assert_eq!(choose(&["avx512f", "erms"]), (CpuChoice::V3, None));
    let (level, why) = choose(&["avx2", "movbe"]);
    assert_eq!(level, CpuChoice::V2);
    assert!(why.unwrap().contains("no movbe, avx2, which x86-64-v3 has"));
    let (level, why) = choose(&["avx2", "aes"]);
    assert_eq!(level, CpuChoice::Host);
    assert!(why.unwrap().contains("aes"));
}

#[test]
fn what_is_asked_for_is_given_or_refused() {
    let node = processor(INTEL, &["avx512f"], 0);
    for choice in [CpuChoice::V2, CpuChoice::V3, CpuChoice::Host] {
        let shown = Shown::choose(choice, &node, false).unwrap();
        assert_eq!((shown.settled(), shown.why), (choice, None));
    }
    let error = Shown::choose(CpuChoice::V4, &node, false).unwrap_err();
    let missing = "avx512f".to_owned();
    assert_eq!(
        error,
        Error::Lacks {
            level: Level::V4,
            missing
        }
    );
    let other = processor(b"CentaurHauls", &[], 0);
    assert_eq!(
        Shown::choose(CpuChoice::V2, &other, false).unwrap_err(),
        Error::Vendor
    );
    assert_eq!(
        Shown::choose(CpuChoice::Auto, &other, false).unwrap().level,
        None
    );
}

#[test]
fn where_cpuid_is_not_intercepted_there_is_the_nodes_processor_only() {
    let node = processor(AMD, &[], 0);
    let auto = Shown::native(CpuChoice::Auto, &node).unwrap();
    assert_eq!((auto.level, auto.why), (None, Some(Error::Native)));
    assert_eq!(Shown::native(CpuChoice::Host, &node).unwrap().why, None);
    assert_eq!(
        Shown::native(CpuChoice::V2, &node).unwrap_err(),
        Error::Native
    );
}

#[test]
fn virtualization_is_shown_to_those_who_may_use_it() {
    for (vendor, word) in [(AMD, Word(0x8000_0001, 0, 2)), (INTEL, Word(1, 0, 2))] {
        let bit = if vendor == AMD { 2 } else { 5 };
        for choice in [CpuChoice::Host, CpuChoice::V3] {
            for nested in [false, true] {
                let node = processor(vendor, &[], 0);
                let shown = Shown::choose(choice, &node, nested).unwrap();
                let Word(function, index, register) = word;
                let registers = ask(&shown.cpuid, function, index);
                assert_eq!(registers[register] >> bit & 1 != 0, nested);
            }
        }
    }
}

#[test]
fn it_says_its_name_and_where_its_registers_are_kept() {
    for (choice, name, components, size) in [
        (CpuChoice::V3, "Blanket x86-64-v3 processor", 7, 832),
        (CpuChoice::V4, "Blanket x86-64-v4 processor", 0xe7, 2432),
    ] {
        let shown = Shown::choose(choice, &processor(AMD, &[], 0), false).unwrap();
        assert_eq!(text(&shown.cpuid, 0x8000_0002..=0x8000_0004), name);
        assert_eq!(ask(&shown.cpuid, 0xd, 0), [components, size, size, 0]);
    }
    let shown = Shown::choose(CpuChoice::V2, &processor(AMD, &[], 0), false).unwrap();
    assert_eq!(ask(&shown.cpuid, 0xd, 0), [0; 4]);
    assert_eq!(ask(&shown.cpuid, 0, 0)[0], 0xb);
}

#[test]
fn amds_processors_repeat_their_first_features() {
    let shown = Shown::choose(CpuChoice::V2, &processor(AMD, &[], 0), false).unwrap();
    let first = ask(&shown.cpuid, 1, 0)[3];
    let further = ask(&shown.cpuid, 0x8000_0001, 0)[3];
    assert_eq!(further & REPEATED, first & REPEATED);
    assert_ne!(first & REPEATED, 0);
}

proptest! {
    /// Whatever else the nodes' processors say, guests are told the same.
    #[test]
    fn unlike_nodes_show_like_processors(
        noise: u32, other: u32, intel: bool, without in proptest::sample::subsequence(
            ALL.iter().filter(|f| f.given == Given::From(Level::V4)).map(|f| f.name).collect::<Vec<_>>(), 0..8)
    ) {
        let vendor = if intel { INTEL } else { AMD };
        for choice in [CpuChoice::V2, CpuChoice::V3] {
            let one = Shown::choose(choice, &processor(vendor, &[], noise), false).unwrap();
            let two = Shown::choose(choice, &processor(vendor, &without, other), false).unwrap();
            // KVM's signature is KVM's own.
            let same = |shown: Shown| -> Vec<_> {
                let known = |entry: &kvm_cpuid_entry2| entry.function != 0x4000_0000;
                shown.cpuid.into_iter().filter(known).collect()
            };
            prop_assert_eq!(same(one), same(two));
        }
    }

    /// A guest is shown nothing that KVM does not offer.
    #[test]
    fn nothing_is_shown_that_is_not_there(without in proptest::sample::subsequence(
        ALL.iter().map(|f| f.name).collect::<Vec<_>>(), 0..8), nested: bool
    ) {
        let node = processor(AMD, &without, 0);
        for choice in [CpuChoice::V2, CpuChoice::V3, CpuChoice::V4] {
            let Ok(shown) = Shown::choose(choice, &node, nested) else { continue };
            for feature in ALL {
                let Word(function, index, register) = feature.word;
                let bit = |table: &[_]| ask(table, function, index)[register] >> feature.bit & 1;
                prop_assert!(bit(&shown.cpuid) <= bit(&node), "{}", feature.name);
            }
        }
    }
}
