//! Capture files (draft-ietf-opsawg-pcapng), as Wireshark and tcpdump read
//! them.

use std::io::{self, Write};
use std::time::Duration;

use crate::frame::Frame;

use super::Direction;

pub(super) const SECTION: u32 = 0x0a0d_0d0a;
pub(super) const INTERFACE: u32 = 1;
pub(super) const STATISTICS: u32 = 5;
pub(super) const PACKET: u32 = 6;
pub(super) const COMMENT: u16 = 1;
pub(super) const RECEIVED: u16 = 4;
pub(super) const DROPPED: u16 = 5;
pub(super) const BYTE_ORDER: u32 = 0x1a2b_3c4d;
const ETHERNET: u16 = 1;

/// An interface of the capture: a port or a tunnel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interface(u32);

/// Writes a capture to a file or a pipe, a block at a time and each in one
/// call.
#[derive(Debug)]
pub struct Writer<W> {
    to: W,
    snaplen: u32,
    interfaces: u32,
    block: Vec<u8>,
}

fn pad(block: &mut Vec<u8>) {
    block.resize(block.len().next_multiple_of(4), 0);
}

fn option(block: &mut Vec<u8>, code: u16, value: &[u8]) {
    let value = &value[..value.len().min(usize::from(u16::MAX) - 3)];
    block.extend(code.to_le_bytes());
    block.extend((value.len() as u16).to_le_bytes());
    block.extend(value);
    pad(block);
}

impl<W: Write> Writer<W> {
    /// Begins a capture of which each frame has `snaplen` bytes at most (0:
    /// all).
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub fn new(to: W, snaplen: u32) -> io::Result<Self> {
        let mut writer = Self {
            to,
            snaplen: if snaplen == 0 { 262_144 } else { snaplen },
            interfaces: 0,
            block: Vec::new(),
        };
        writer.begin(SECTION);
        let block = &mut writer.block;
        block.extend(BYTE_ORDER.to_le_bytes());
        // Version 1.0, of a length that is not known.
        block.extend([1, 0, 0, 0]);
        block.extend(u64::MAX.to_le_bytes());
        option(block, 4, b"blanket-switch");
        option(block, 0, &[]);
        writer.end()?;
        Ok(writer)
    }

    /// Adds an interface.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub fn interface(&mut self, name: &str) -> io::Result<Interface> {
        self.begin(INTERFACE);
        self.block.extend(ETHERNET.to_le_bytes());
        self.block.extend([0; 2]);
        self.block.extend(self.snaplen.to_le_bytes());
        option(&mut self.block, 2, name.as_bytes());
        // Time in units of 10^-9 s.
        option(&mut self.block, 9, &[9]);
        option(&mut self.block, 0, &[]);
        self.end()?;
        self.interfaces += 1;
        Ok(Interface(self.interfaces - 1))
    }

    /// Adds a frame that was there at `time` (since 1970). Checksums that are
    /// left to compute are captured so.
    ///
    /// # Errors
    ///
    /// It cannot be written. Of a pipe that is full, nothing was.
    pub fn frame(
        &mut self,
        interface: Interface,
        direction: Direction,
        time: Duration,
        frame: &Frame<'_>,
    ) -> io::Result<()> {
        self.frame_with(interface, direction, time, frame, "")
    }

    /// The same with a comment, unless it is empty.
    ///
    /// # Errors
    ///
    /// As [`Writer::frame`].
    pub fn frame_with(
        &mut self,
        interface: Interface,
        direction: Direction,
        time: Duration,
        frame: &Frame<'_>,
        comment: &str,
    ) -> io::Result<()> {
        let len = frame.len();
        let captured = len.min(self.snaplen as usize);
        self.begin(PACKET);
        let block = &mut self.block;
        block.extend(interface.0.to_le_bytes());
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        block.extend(((nanos >> 32) as u32).to_le_bytes());
        block.extend((nanos as u32).to_le_bytes());
        block.extend((captured as u32).to_le_bytes());
        block.extend((len as u32).to_le_bytes());
        let at = block.len();
        block.resize(at + captured, 0);
        frame.copy_from(0, &mut block[at..]);
        pad(block);
        let flags: u32 = match direction {
            Direction::In => 1,
            Direction::Out => 2,
        };
        if !comment.is_empty() {
            option(block, COMMENT, comment.as_bytes());
        }
        option(block, 2, &flags.to_le_bytes());
        option(block, 0, &[]);
        self.end()
    }

    /// Says how many frames of an interface were to be captured, and how many
    /// of these were not.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub fn statistics(
        &mut self,
        interface: Interface,
        time: Duration,
        received: u64,
        dropped: u64,
    ) -> io::Result<()> {
        self.begin(STATISTICS);
        let block = &mut self.block;
        block.extend(interface.0.to_le_bytes());
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        block.extend(((nanos >> 32) as u32).to_le_bytes());
        block.extend((nanos as u32).to_le_bytes());
        option(block, RECEIVED, &received.to_le_bytes());
        option(block, DROPPED, &dropped.to_le_bytes());
        option(block, 0, &[]);
        self.end()
    }

    /// Has all that was written arrive.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }

    /// Ends the capture.
    pub fn into_inner(self) -> W {
        self.to
    }

    /// Where it is written to.
    pub fn get_mut(&mut self) -> &mut W {
        &mut self.to
    }

    fn begin(&mut self, kind: u32) {
        self.block.clear();
        self.block.extend(kind.to_le_bytes());
        self.block.extend([0; 4]);
    }

    fn end(&mut self) -> io::Result<()> {
        let total = (self.block.len() as u32 + 4).to_le_bytes();
        self.block[4..8].copy_from_slice(&total);
        self.block.extend(total);
        self.to.write_all(&self.block)
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use vm_memory::VolatileSlice;

    use super::*;
    use crate::frame::{Head, Offload};

    fn capture() -> Vec<u8> {
        // A datagram from 10.0.0.1:5000 to 10.0.0.2:53 with 300 bytes.
        let mut bytes = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0];
        bytes.extend([0x45, 0, 1, 72, 0, 0, 0x40, 0, 64, 17, 0, 0]);
        bytes.extend([10, 0, 0, 1, 10, 0, 0, 2, 0x13, 0x88, 0, 7, 1, 52, 0, 0]);
        bytes.resize(bytes.len() + 300, 0xab);
        let head = Head::of(&bytes);
        let at = head.bytes().len();
        let pieces = [VolatileSlice::from(&mut bytes[at..])];
        let frame = Frame {
            head,
            body: &pieces,
            offload: Offload::default(),
        };
        let mut writer = Writer::new(Vec::new(), 128).expect("memory");
        let one = writer.interface("guest web").expect("memory");
        let two = writer.interface("tunnel 2").expect("memory");
        let time = Duration::new(1_700_000_000, 123_456_789);
        writer
            .frame(one, Direction::In, time, &frame)
            .expect("memory");
        let time = time + Duration::from_nanos(1);
        writer
            .frame(two, Direction::Out, time, &frame)
            .expect("memory");
        writer.into_inner()
    }

    #[test]
    fn blocks_are_as_long_as_they_say() {
        let bytes = capture();
        let word = |at: usize| {
            let word = bytes[at..at + 4].try_into().expect("four");
            u32::from_le_bytes(word)
        };
        let (mut at, mut kinds) = (0, Vec::new());
        while at < bytes.len() {
            let len = word(at + 4) as usize;
            assert_eq!(word(at + len - 4) as usize, len);
            kinds.push(word(at));
            at += len;
        }
        assert_eq!(kinds, [SECTION, INTERFACE, INTERFACE, PACKET, PACKET]);
    }

    #[test]
    fn tcpdump_reads_a_capture() {
        let path = std::env::temp_dir().join(format!("capture-{}.pcapng", std::process::id()));
        std::fs::write(&path, capture()).expect("a temporary file");
        let output = Command::new("tcpdump")
            .args(["-nn", "-tt", "--nano", "-e", "-r"])
            .arg(&path)
            .output();
        let _ = std::fs::remove_file(&path);
        let Ok(output) = output else {
            println!("skipped, because tcpdump is not installed");
            return;
        };
        let text = String::from_utf8_lossy(&output.stdout);
        let lines: Vec<&str> = text.lines().collect();
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert_eq!(lines.len(), 2, "{text}{complaint}");
        assert!(lines[0].starts_with("1700000000.123456789 "), "{text}");
        assert!(lines[1].starts_with("1700000000.123456790 "), "{text}");
        for line in lines {
            assert!(
                line.contains("02:00:00:00:00:01 > 02:00:00:00:00:02"),
                "{line}"
            );
            assert!(line.contains("length 342"), "{line}");
            assert!(line.contains("10.0.0.1.5000 > 10.0.0.2.7"), "{line}");
        }
    }
}
