//! Writes initramfs archives ("newc" cpio; Linux `Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::io::{self, Write};

/// Archives that follow each other in one initramfs start at such an offset.
const BLOCK: usize = 512;

const FOLDER: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// Writes one archive. Times are zero and owners root, so that the bytes depend on nothing else.
pub(crate) struct Writer<W> {
    to: W,
    written: usize,
    inode: u32,
}

impl<W: Write> Writer<W> {
    pub(crate) fn new(to: W) -> Self {
        Self {
            to,
            written: 0,
            inode: 0,
        }
    }

    pub(crate) fn folder(&mut self, path: &str, mode: u32) -> io::Result<()> {
        self.entry(path, FOLDER | mode, &[], (0, 0))
    }

    pub(crate) fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.entry(path, FILE | mode, content, (0, 0))
    }

    pub(crate) fn link(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.entry(path, LINK | 0o777, target.as_bytes(), (0, 0))
    }

    pub(crate) fn character_device(
        &mut self,
        path: &str,
        mode: u32,
        major: u32,
        minor: u32,
    ) -> io::Result<()> {
        self.entry(path, CHARACTER_DEVICE | mode, &[], (major, minor))
    }

    /// Writes the end mark and pads the archive.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        self.entry("TRAILER!!!", 0, &[], (0, 0))?;
        self.pad(BLOCK)?;
        self.to.flush()
    }

    fn entry(
        &mut self,
        path: &str,
        mode: u32,
        content: &[u8],
        device: (u32, u32),
    ) -> io::Result<()> {
        let size = u32::try_from(content.len()).map_err(|_| {
            io::Error::other(format!(
                "{path} has 4 GiB or more: an initramfs cannot hold it"
            ))
        })?;
        self.inode += 1;
        let name_size = path.len() as u32 + 1;
        let fields = [
            self.inode, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0,
        ];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08X}"));
        }
        header.push_str(path);
        header.push('\0');
        self.write(header.as_bytes())?;
        self.pad(4)?;
        self.write(content)?;
        self.pad(4)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len();
        self.to.write_all(bytes)
    }

    fn pad(&mut self, to: usize) -> io::Result<()> {
        let missing = self.written.next_multiple_of(to) - self.written;
        self.write(&[0; BLOCK][..missing])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::process::{Command, Stdio};

    /// Reads an archive back: path, mode, content.
    fn entries(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let total = bytes.len();
        let mut found = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |n: usize| {
                let hex = std::str::from_utf8(&bytes[6 + 8 * n..14 + 8 * n]).unwrap();
                u32::from_str_radix(hex, 16).unwrap() as usize
            };
            let (mode, size, name_size) = (field(1) as u32, field(6), field(11));
            let name = String::from_utf8(bytes[110..110 + name_size - 1].to_vec()).unwrap();
            let start = (total - bytes.len() + 110 + name_size).next_multiple_of(4);
            let start = start - (total - bytes.len());
            let content = bytes[start..start + size].to_vec();
            if name == "TRAILER!!!" {
                return found;
            }
            bytes = &bytes[(start + size).next_multiple_of(4)..];
            found.push((name, mode, content));
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(
            files in proptest::collection::vec(
                ("[a-z]{1,40}", 0u32..0o1000, proptest::collection::vec(any::<u8>(), 0..200)), 0..20)
        ) {
            let mut bytes = Vec::new();
            let mut writer = Writer::new(&mut bytes);
            for (path, mode, content) in &files {
                writer.file(path, *mode, content).unwrap();
            }
            writer.finish().unwrap();
            prop_assert_eq!(bytes.len() % BLOCK, 0);
            let expected: Vec<_> =
                files.into_iter().map(|(path, mode, content)| (path, FILE | mode, content)).collect();
            prop_assert_eq!(entries(&bytes), expected);
        }
    }

    #[test]
    fn busybox_lists_every_kind_of_entry() {
        crate::packages::ensure_packages(&["busybox-static"]).unwrap();
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes);
        writer.folder("dev", 0o755).unwrap();
        writer.character_device("dev/console", 0o600, 5, 1).unwrap();
        writer.file("hello", 0o644, b"world").unwrap();
        writer.link("greeting", "hello").unwrap();
        writer.finish().unwrap();
        let mut cpio = Command::new("busybox")
            .args(["cpio", "-tv"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        cpio.stdin.take().unwrap().write_all(&bytes).unwrap();
        let output = cpio.wait_with_output().unwrap();
        let list = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success());
        for part in [
            "drwxr-xr-x",
            "crw-------",
            "-rw-r--r--",
            "greeting -> hello",
        ] {
            assert!(list.contains(part), "{part} is missing in\n{list}");
        }
    }
}
