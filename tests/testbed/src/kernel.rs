//! Debian's kernels: the compressed image, the ELF inside it, and the modules.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache::{self, Key};
use crate::error::{Context, Result, malformed};
use crate::packages::{self, Set, Source};
use crate::program;

/// Which of Debian's kernels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KernelFlavor {
    /// `linux-image-cloud-amd64`: has what virtual machines of clouds need. Boots fastest.
    #[default]
    Cloud,
    /// `linux-image-amd64`: has drivers for real hardware, and can be a Xen dom0.
    Generic,
    /// `linux-image-cloud-amd64` from the backports to this Debian, if there are any.
    Backports,
}

impl KernelFlavor {
    fn package(self) -> &'static str {
        match self {
            Self::Cloud | Self::Backports => "linux-image-cloud-amd64",
            Self::Generic => "linux-image-amd64",
        }
    }

    fn source(self) -> Source {
        match self {
            Self::Cloud | Self::Generic => Source::Machine,
            Self::Backports => Source::Backports,
        }
    }
}

/// A kernel, unpacked.
#[derive(Clone, Debug)]
pub struct Kernel {
    folder: PathBuf,
    release: String,
}

impl Kernel {
    /// Unpacks the newest kernel of this flavor that `apt` offers, unless that was done before.
    ///
    /// # Errors
    /// When `apt` fails or the image has a format that is not known.
    pub fn get(flavor: KernelFlavor) -> Result<Self> {
        packages::ensure_packages(&["kmod", "xz-utils", "zstd"])?;
        let source = flavor.source();
        let meta = Set::exactly(source, &[flavor.package()])?;
        let package = packages::behind_meta(source, flavor.package())?;
        let set = Set::exactly(source, &[&package])?;
        let release = package.trim_start_matches("linux-image-").to_owned();
        let key = Key::default()
            .with(meta.identity())
            .with(set.identity())
            .with(include_bytes!("kernel.rs"));
        let kind = format!("kernel-{release}");
        let folder = cache::entry(&kind, key, |folder| unpack(&set, &release, folder))?;
        Ok(Self { folder, release })
    }

    /// The release, as `uname -r` says it.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// The compressed image (bzImage).
    pub fn vmlinuz(&self) -> PathBuf {
        self.folder.join("vmlinuz")
    }

    /// The uncompressed ELF with its PVH entry.
    pub fn vmlinux(&self) -> PathBuf {
        self.folder.join("vmlinux")
    }

    /// The folder with all modules and their indices.
    pub(crate) fn modules(&self) -> PathBuf {
        modules_folder(&self.folder, &self.release)
    }

    /// The kernel's identity, for the key of something made with it.
    pub(crate) fn identity(&self) -> String {
        self.folder.to_string_lossy().into_owned()
    }

    /// The paths, relative to [`Kernel::modules`], of these modules and of all that they need.
    /// Modules that are built in need no file.
    ///
    /// # Errors
    /// [`crate::Error::Format`] when the kernel has no such module.
    pub(crate) fn closure(&self, names: &[&str]) -> Result<BTreeSet<String>> {
        let index = self.modules().join("modules.dep");
        let text = read_text(&index)?;
        let needs: BTreeMap<String, (&str, &str)> = text
            .lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(path, needs)| (module_name(path), (path, needs)))
            .collect();
        let builtin = read_text(&self.modules().join("modules.builtin"))?;
        let builtin: BTreeSet<String> = builtin.lines().map(module_name).collect();
        let mut found = BTreeSet::new();
        for name in names {
            let name = module_name(name);
            match needs.get(&name) {
                // Each line of modules.dep has the whole closure.
                Some((path, needs)) => {
                    found.insert((*path).to_owned());
                    found.extend(needs.split_whitespace().map(str::to_owned));
                }
                None if builtin.contains(&name) => {}
                None => return Err(malformed(&index, format!("has no module {name}"))),
            }
        }
        Ok(found)
    }
}

fn read_text(path: &Path) -> Result<String> {
    fs::read_to_string(path).context(|| format!("cannot read {}", path.display()))
}

fn modules_folder(folder: &Path, release: &str) -> PathBuf {
    folder.join("lib/modules").join(release)
}

/// `kernel/a/b-c.ko.xz` is the module `b_c`.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

fn unpack(set: &Set, release: &str, folder: &Path) -> Result<()> {
    for deb in set.download()? {
        program::run(Command::new("dpkg-deb").arg("-x").arg(deb).arg(folder))?;
    }
    let boot = folder.join("boot");
    let vmlinuz = folder.join("vmlinuz");
    fs::rename(boot.join(format!("vmlinuz-{release}")), &vmlinuz)
        .context(|| format!("cannot find the kernel in {}", boot.display()))?;
    let image = fs::read(&vmlinuz).context(|| format!("cannot read {}", vmlinuz.display()))?;
    let elf = uncompressed(&image).map_err(|problem| malformed(&vmlinuz, problem))?;
    fs::write(folder.join("vmlinux"), elf).context(|| "cannot write vmlinux".to_owned())?;
    program::run(Command::new("depmod").arg("-b").arg(folder).arg(release))?;
    Ok(())
}

/// The ELF inside a bzImage (Linux `Documentation/arch/x86/boot.rst`, fields `payload_offset`
/// and `payload_length`).
fn uncompressed(image: &[u8]) -> Result<Vec<u8>, String> {
    let field = |at: usize| {
        let bytes = image
            .get(at..at + 4)
            .and_then(|bytes| bytes.try_into().ok());
        bytes
            .map(|bytes| u32::from_le_bytes(bytes) as usize)
            .ok_or("is cut off")
    };
    if image.get(0x202..0x206) != Some(b"HdrS") {
        return Err("is no bzImage".to_owned());
    }
    let setup_sectors = match image[0x1f1] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (setup_sectors + 1) * 512 + field(0x248)?;
    let payload = image
        .get(start..start + field(0x24c)?)
        .ok_or("is cut off")?;
    // Every format but ELF itself is followed by the uncompressed size.
    let size = payload
        .last_chunk()
        .map_or(0, |bytes| u32::from_le_bytes(*bytes) as usize);
    let mut elf = Vec::with_capacity(size);
    let read = match payload {
        [0x1f, 0x8b, ..] => flate2::read::GzDecoder::new(payload).read_to_end(&mut elf),
        [0x02, 0x21, 0x4c, 0x18, ..] => {
            // The size that follows would be taken for the next block.
            let blocks = &payload[..payload.len() - 4];
            lz4_flex::frame::FrameDecoder::new(blocks).read_to_end(&mut elf)
        }
        [0xfd, b'7', b'z', ..] => pipe("xz", payload, &mut elf),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => pipe("zstd", payload, &mut elf),
        [0x7f, b'E', b'L', b'F', ..] => return Ok(payload.to_vec()),
        other => {
            return Err(format!(
                "has an unknown compression {:02x?}",
                &other[..4.min(other.len())]
            ));
        }
    };
    read.map_err(|error| format!("cannot be uncompressed: {error}"))?;
    if elf.starts_with(b"\x7fELF") && elf.len() >= size {
        Ok(elf)
    } else {
        Err(format!(
            "gives {} bytes that are no ELF of {size} bytes",
            elf.len()
        ))
    }
}

/// Uncompresses with a program, which complains about the size that follows the data.
fn pipe(program: &str, payload: &[u8], to: &mut Vec<u8>) -> std::io::Result<usize> {
    use std::io::{Seek, Write};
    let mut input = tempfile::tempfile()?;
    input.write_all(&payload[..payload.len() - 4])?;
    input.rewind()?;
    let output = Command::new(program).arg("-dc").stdin(input).output()?;
    if !output.status.success() {
        return Err(std::io::Error::other(
            String::from_utf8_lossy(&output.stderr).into_owned(),
        ));
    }
    *to = output.stdout;
    Ok(to.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn bz_image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024 + 16];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248] = 16;
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend_from_slice(payload);
        image
    }

    fn elf() -> Vec<u8> {
        [b"\x7fELF".as_slice(), &[5; 100_000]].concat()
    }

    #[test]
    fn each_compression_is_undone() {
        packages::ensure_packages(&["lz4", "xz-utils", "zstd"]).unwrap();
        let elf = elf();
        let size = (elf.len() as u32).to_le_bytes();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&elf).unwrap();
        let mut payloads = vec![gzip.finish().unwrap()];
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&elf).unwrap();
        for program in [["xz", "-kc"], ["zstd", "-qc"], ["lz4", "-lc"]] {
            let output = Command::new(program[0])
                .arg(program[1])
                .arg(file.path())
                .output()
                .unwrap();
            assert!(output.status.success());
            payloads.push([output.stdout.as_slice(), &size].concat());
        }
        for payload in payloads {
            assert!(
                uncompressed(&bz_image(&payload)).unwrap() == elf,
                "{:x?}",
                &payload[..4]
            );
        }
        assert!(uncompressed(&bz_image(&elf)).unwrap() == elf);
    }

    #[test]
    fn a_damaged_image_is_an_error() {
        assert!(uncompressed(&[]).is_err());
        assert!(uncompressed(&bz_image(&[0x1f, 0x8b, 1, 2])).is_err());
        assert!(
            uncompressed(&bz_image(b"abcdef"))
                .unwrap_err()
                .contains("unknown")
        );
        assert!(uncompressed(&bz_image(&elf())[..2000]).is_err());
    }

    #[test]
    fn module_names_are_found_in_paths() {
        assert_eq!(module_name("kernel/arch/x86/kvm/kvm-amd.ko"), "kvm_amd");
        assert_eq!(module_name("virtio_net.ko.xz"), "virtio_net");
        assert_eq!(module_name("tun"), "tun");
    }
}
