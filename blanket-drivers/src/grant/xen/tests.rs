use std::io::{self, Read, Write};
use std::sync::Arc;

use super::{Error, Memory, checked, is_provider, selftest, store};
use crate::grant::PAGE;
use crate::grant::xen::abi::{self, Range};
use crate::grant::xen::{allocator, mapper};

#[test]
fn calls_have_the_numbers_of_the_public_headers() {
    // _IOC(_IOC_NONE, kind, number, size) of <xen/gntdev.h> and so on.
    assert_eq!(abi::GNTDEV_MAP_GRANT_REF(), 0x0018_4700);
    assert_eq!(abi::GNTDEV_UNMAP_GRANT_REF(), 0x0010_4701);
    assert_eq!(abi::GNTALLOC_ALLOC_GREF(), 0x0018_4705);
    assert_eq!(abi::GNTALLOC_DEALLOC_GREF(), 0x0010_4706);
    assert_eq!(abi::SET_UNMAP_NOTIFY(), 0x0010_4707);
    assert_eq!(abi::EVTCHN_BIND_INTERDOMAIN(), 0x0008_4501);
    assert_eq!(abi::EVTCHN_BIND_UNBOUND_PORT(), 0x0004_4502);
    assert_eq!(abi::EVTCHN_UNBIND(), 0x0004_4503);
    assert_eq!(abi::EVTCHN_NOTIFY(), 0x0004_4504);
    assert_eq!(size_of::<abi::Range>(), 16);
    assert_eq!(size_of::<abi::Notify>(), 16);
}

#[test]
fn requests_are_laid_out_as_the_drivers_read_them() {
    let map = mapper::request(3, &[7, 0xffff_fff0]);
    assert_eq!(map, [2, 0, 7 << 32 | 3, 0xffff_fff0 << 32 | 3]);
    let share = allocator::request(0x7ff0, 3, true);
    assert_eq!(share, [3 << 32 | 1 << 16 | 0x7ff0, 0, 0, 0]);
    assert_eq!(allocator::request(1, 1, false), [1 << 32 | 1, 0, 0]);
    let answered = [0, 0x5000, 9 << 32 | 8, 10];
    assert_eq!(allocator::references(&answered, 3), [8, 9, 10]);
}

#[test]
fn none_or_too_many_pages_are_not_asked_for() {
    assert_eq!(checked(1).unwrap(), 1);
    assert_eq!(checked(1024).unwrap(), 1024);
    for count in [0, 1025, usize::MAX] {
        assert!(matches!(checked(count), Err(Error::Count { .. })));
    }
}

#[test]
fn shared_memory_is_reached_within_its_pages_and_as_it_is_mapped() {
    let file = Arc::new(tempfile::tempfile().unwrap());
    file.set_len(3 * PAGE as u64).unwrap();
    // A plain file in the driver's place knows no such call.
    let map = |writable| {
        let range = Range::new(PAGE as u64, 2);
        Memory::map(&file, range, abi::GNTDEV_UNMAP_GRANT_REF(), writable).unwrap()
    };
    let memory = map(true);
    memory.write(PAGE - 2, b"abcd").unwrap();
    let readable = map(false);
    let mut seen = [0; 4];
    readable.read(PAGE - 2, &mut seen).unwrap();
    assert_eq!(&seen, b"abcd");
    assert!(matches!(readable.write(0, b"x"), Err(Error::ReadOnly)));
    for (offset, len) in [(2 * PAGE, 1), (2 * PAGE - 1, 2), (usize::MAX, 2)] {
        assert!(matches!(
            memory.iovec(offset, len),
            Err(Error::Range { .. })
        ));
        assert!(memory.write(offset, &vec![0; len]).is_err());
    }
}

/// Answers what it has whatever is asked, and keeps the question.
struct Store {
    question: Vec<u8>,
    answer: io::Cursor<Vec<u8>>,
}

impl Store {
    fn new(operation: u32, len: u32, text: &str) -> Self {
        let mut answer = Vec::new();
        for word in [operation, 0, 0, len] {
            answer.extend(word.to_ne_bytes());
        }
        answer.extend(text.bytes());
        Self {
            question: Vec::new(),
            answer: io::Cursor::new(answer),
        }
    }
}

impl Read for &mut Store {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.answer.read(out)
    }
}

impl Write for &mut Store {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.question.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn xenstored_is_asked_for_the_domain_and_need_not_make_sense() {
    let mut good = Store::new(2, 2, "17");
    assert_eq!(store::ask(&mut good, "domid").unwrap(), Some(17));
    let mut words = good.question.chunks(4);
    let mut word = || u32::from_ne_bytes(words.next().unwrap().try_into().unwrap());
    assert_eq!([word(), word(), word(), word()], [2, 0, 0, 6]);
    assert_eq!(good.question[16..], *b"domid\0");
    for (operation, len, text) in [
        (16, 7, "ENOENT\0"),
        (2, 3, "x17"),
        (2, 17, "1"),
        (2, 5, "70000"),
    ] {
        let mut store = Store::new(operation, len, text);
        assert_eq!(store::ask(&mut store, "domid").unwrap(), None, "{text}");
    }
    assert!(store::ask(&mut Store::new(2, 9, "1"), "domid").is_err());
}

#[test]
fn without_xen_the_self_test_names_what_is_missing() {
    if is_provider() {
        return;
    }
    let error = selftest::alone().unwrap_err();
    assert!(matches!(error, Error::Device { .. }), "{error}");
    assert!(error.to_string().contains("modprobe"), "{error}");
}
