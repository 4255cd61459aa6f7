//! Faults on guest memory that user space resolves: userfaultfd(2).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `struct uffdio_api` of `linux/userfaultfd.h`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

/// `struct uffdio_zeropage`.
#[repr(C)]
struct Zero {
    range: Range,
    mode: u64,
    zeroed: i64,
}

/// `struct uffdio_writeprotect`.
#[repr(C)]
struct Protect {
    range: Range,
    mode: u64,
}

/// An ioctl's number: read and write (3) or read (2), of `T`.
const fn number<T>(direction: u64, nr: u64) -> u64 {
    direction << 30 | (size_of::<T>() as u64) << 16 | 0xaa << 8 | nr
}

const API: u64 = number::<Api>(3, 0x3f);
const REGISTER: u64 = number::<Register>(3, 0x00);
const UNREGISTER: u64 = number::<Range>(2, 0x01);
const WAKE: u64 = number::<Range>(2, 0x02);
const COPY: u64 = number::<Copy>(3, 0x03);
const ZERO: u64 = number::<Zero>(3, 0x04);
const PROTECT: u64 = number::<Protect>(3, 0x06);
/// `USERFAULTFD_IOC_NEW`, of `/dev/userfaultfd`.
const NEW: u64 = 0xaa << 8;

/// `UFFD_API`.
const VERSION: u64 = 0xaa;
/// `UFFD_FEATURE_PAGEFAULT_FLAG_WP`.
const FEATURE_PROTECT: u64 = 1;
/// `UFFD_PAGEFAULT_FLAG_WP`.
const FLAG_PROTECTED: u64 = 2;
/// `UFFD_EVENT_PAGEFAULT`.
const EVENT_FAULT: u8 = 0x12;

/// The ioctls of [`Uffd`], for filters.
pub const IOCTLS: &[libc::Ioctl] = &[REGISTER, UNREGISTER, WAKE, COPY, ZERO, PROTECT];

/// Which faults are seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Those on pages that are not there.
    Missing = 1,
    /// Those on pages that are write-protected.
    WriteProtect = 2,
}

/// A fault that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// In this process's address space.
    pub address: u64,
    /// On a page that is write-protected, not missing.
    pub protected: bool,
}

/// A userfaultfd of this process that also sees the kernel's (KVM's) faults.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
    protects: bool,
}

impl Uffd {
    /// Opens one. It needs root, `vm.unprivileged_userfaultfd`, or access to
    /// `/dev/userfaultfd`.
    ///
    /// # Errors
    /// The kernel has none, or does not allow it.
    pub fn open() -> io::Result<Self> {
        const FLAGS: libc::c_int = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: the call takes flags alone and touches no memory.
        let fd = match own(unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS) }) {
            Ok(fd) => fd,
            Err(error) => {
                let device = File::open("/dev/userfaultfd").map_err(|_| error)?;
                // SAFETY: the argument of this ioctl is flags, not an address.
                own(unsafe { libc::ioctl(device.as_raw_fd(), NEW, FLAGS) }.into())?
            }
        };
        let mut uffd = Self {
            fd,
            protects: false,
        };
        let mut api = Api {
            api: VERSION,
            features: 0,
            ioctls: 0,
        };
        // SAFETY: the kernel reads and writes one `struct uffdio_api`.
        unsafe { uffd.call(API, &mut api) }?;
        uffd.protects = api.features & FEATURE_PROTECT != 0;
        Ok(uffd)
    }

    /// Whether it can write-protect.
    #[must_use]
    pub fn protects(&self) -> bool {
        self.protects
    }

    /// # Safety
    /// `argument` is what `request` takes, and all that it names is valid for it.
    unsafe fn call<T>(&self, request: u64, argument: &mut T) -> io::Result<()> {
        // SAFETY: promised by the caller.
        let done = unsafe { libc::ioctl(self.fd.as_raw_fd(), request, &raw mut *argument) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Sees faults of a kind on whole pages of a mapping of guest memory.
    ///
    /// # Errors
    /// Not possible with this kind of memory.
    pub fn register(&self, start: u64, len: u64, mode: Mode) -> io::Result<()> {
        let mut register = Register {
            range: Range { start, len },
            mode: mode as u64,
            ioctls: 0,
        };
        // SAFETY: registering changes no content; who touches a page waits.
        unsafe { self.call(REGISTER, &mut register) }
    }

    /// Sees no more faults there; nothing is protected any more, who waited
    /// goes on.
    ///
    /// # Errors
    /// It was not registered.
    pub fn unregister(&self, start: u64, len: u64) -> io::Result<()> {
        let mut range = Range { start, len };
        // SAFETY: it changes no content.
        unsafe { self.call(UNREGISTER, &mut range) }?;
        self.wake(start, len)
    }

    /// Lets those go on that wait for pages there.
    ///
    /// # Errors
    /// There is no such range.
    pub fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        let mut range = Range { start, len };
        // SAFETY: it changes no content.
        unsafe { self.call(WAKE, &mut range) }
    }

    /// Puts `content`, whole pages, where pages are missing, and lets those go
    /// on that wait for them. Pages that are there stay as they are.
    ///
    /// # Errors
    /// There is no memory, or the range is not registered.
    pub fn fill(&self, start: u64, content: &[u8]) -> io::Result<()> {
        pages(content.len(), |at, len| {
            let mut copy = Copy {
                dst: start + at as u64,
                src: content[at..].as_ptr() as u64,
                len: len as u64,
                mode: 0,
                copied: 0,
            };
            // SAFETY: the source has `len` bytes from `at` on; the destination is
            // registered memory of the guest's, where nothing is yet.
            let done = unsafe { self.call(COPY, &mut copy) };
            (done, copy.copied)
        })?;
        self.wake(start, content.len() as u64)
    }

    /// The same with zeros.
    ///
    /// # Errors
    /// As [`Uffd::fill`].
    pub fn fill_zeros(&self, start: u64, len: usize) -> io::Result<()> {
        pages(len, |at, len| {
            let mut zero = Zero {
                range: Range {
                    start: start + at as u64,
                    len: len as u64,
                },
                mode: 0,
                zeroed: 0,
            };
            // SAFETY: the range is registered memory of the guest's, where nothing
            // is yet.
            let done = unsafe { self.call(ZERO, &mut zero) };
            (done, zero.zeroed)
        })?;
        self.wake(start, len as u64)
    }

    /// Write-protects the pages that are there, or lets them be written again
    /// and those go on that wait to.
    ///
    /// # Errors
    /// The range is not registered.
    pub fn protect(&self, start: u64, len: u64, on: bool) -> io::Result<()> {
        loop {
            let mut protect = Protect {
                range: Range { start, len },
                mode: u64::from(on),
            };
            // SAFETY: it changes no content.
            match unsafe { self.call(PROTECT, &mut protect) } {
                // The mappings are being changed.
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
                done => return done,
            }
        }
    }

    /// The next fault that waits, if there is one.
    ///
    /// # Errors
    /// The descriptor cannot be read.
    pub fn fault(&self) -> io::Result<Option<Fault>> {
        loop {
            // `struct uffd_msg`: the event, then flags and address of a fault.
            let mut message = [0u64; 4];
            let size = size_of_val(&message);
            // SAFETY: the buffer has `size` bytes.
            let read =
                unsafe { libc::read(self.fd.as_raw_fd(), message.as_mut_ptr().cast(), size) };
            if read < 0 {
                let error = io::Error::last_os_error();
                return match error.kind() {
                    io::ErrorKind::WouldBlock => Ok(None),
                    io::ErrorKind::Interrupted => continue,
                    _ => Err(error),
                };
            }
            if read as usize == size && message[0] as u8 == EVENT_FAULT {
                return Ok(Some(Fault {
                    address: message[2],
                    protected: message[1] & FLAG_PROTECTED != 0,
                }));
            }
        }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Takes over a new descriptor.
fn own(fd: libc::c_long) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made it for us; nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Does `one` to the pages of `len` bytes: to as many at once as it does, told
/// by offset and length. Pages that are there are passed over.
fn pages(len: usize, one: impl Fn(usize, usize) -> (io::Result<()>, i64)) -> io::Result<()> {
    const PAGE: usize = 4096;
    let mut at = 0;
    while at < len {
        let (done, bytes) = one(at, len - at);
        let Err(error) = done else {
            return Ok(());
        };
        match (error.raw_os_error(), usize::try_from(bytes)) {
            (Some(libc::EAGAIN | libc::EEXIST), Ok(some)) if some > 0 => at += some,
            (Some(libc::EEXIST), _) => at += PAGE,
            (Some(libc::EAGAIN), _) => {}
            _ => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    use super::*;
    use crate::{Backing, GuestRam, Spec};

    const SIZE: u64 = 32 << 20;

    /// Guest memory, where it is, and a userfaultfd; none where the kernel has
    /// none for this user.
    fn memory() -> Option<(GuestRam, u64, Uffd)> {
        let uffd = match Uffd::open() {
            Ok(uffd) => uffd,
            Err(error) => {
                println!("skipped: {error}");
                return None;
            }
        };
        let spec = Spec {
            size: SIZE,
            backing: Backing::Transparent,
            shared: false,
        };
        let ram = crate::build(&spec).unwrap();
        let start = ram.iter().next().unwrap().as_ptr() as u64;
        Some((ram, start, uffd))
    }

    fn wait(uffd: &Uffd) -> Fault {
        loop {
            match uffd.fault().unwrap() {
                Some(fault) => return fault,
                None => thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    #[test]
    fn who_touches_a_missing_page_goes_on_with_what_is_put_there() {
        let Some((ram, start, uffd)) = memory() else {
            return;
        };
        uffd.register(start, SIZE, Mode::Missing).unwrap();
        let reader = ram.clone();
        let read = thread::spawn(move || {
            let at = |at| reader.read_obj::<u64>(GuestAddress(at)).unwrap();
            [at(0x3008), at(0x2008), at(0x8008)]
        });
        let fault = wait(&uffd);
        assert_eq!(
            (fault.address & !4095, fault.protected),
            (start + 0x3000, false)
        );
        uffd.fill(start + 0x3000, &[3; 4096]).unwrap();
        assert_eq!(wait(&uffd).address & !4095, start + 0x2000);
        // One of them is there already, and stays.
        uffd.fill(start + 0x1000, &[2; 4 * 4096]).unwrap();
        assert_eq!(wait(&uffd).address & !4095, start + 0x8000);
        uffd.fill_zeros(start + 0x3000, 16 * 4096).unwrap();
        let three = u64::from_ne_bytes([3; 8]);
        let two = u64::from_ne_bytes([2; 8]);
        assert_eq!(read.join().unwrap(), [three, two, 0]);
        uffd.unregister(start, SIZE).unwrap();
        assert_eq!(ram.read_obj::<u8>(GuestAddress(SIZE - 1)).unwrap(), 0);
    }

    #[test]
    fn who_writes_to_a_protected_page_waits_and_who_reads_does_not() {
        let Some((ram, start, uffd)) = memory() else {
            return;
        };
        if !uffd.protects() {
            println!("skipped: no write-protection");
            return;
        }
        ram.write_obj(1u8, GuestAddress(0x3000)).unwrap();
        uffd.register(start, SIZE, Mode::WriteProtect).unwrap();
        uffd.protect(start, SIZE, true).unwrap();
        let writer = ram.clone();
        let written = thread::spawn(move || writer.write_obj(2u8, GuestAddress(0x3000)).unwrap());
        let fault = wait(&uffd);
        assert_eq!(
            (fault.address & !4095, fault.protected),
            (start + 0x3000, true)
        );
        assert_eq!(ram.read_obj::<u8>(GuestAddress(0x3000)).unwrap(), 1);
        uffd.protect(start + 0x3000, 4096, false).unwrap();
        written.join().unwrap();
        assert_eq!(ram.read_obj::<u8>(GuestAddress(0x3000)).unwrap(), 2);
        uffd.unregister(start, SIZE).unwrap();
        ram.write_obj(3u8, GuestAddress(0x4000)).unwrap();
    }
}
