//! `blanket-agent`: both ends of the testbed's command channel as a program.
//!
//! - `blanket-agent serve DEVICE` serves a virtio port or console for ever; with `-` as DEVICE,
//!   standard input and output until the input ends.
//! - `blanket-agent relay SOCKET` joins standard input and output to a Unix socket, until either
//!   side ends.
//! - `blanket-agent join DEVICE DEVICE` passes on what either device says to the other, until one
//!   of them fails.
//! - `blanket-agent client SOCKET -- COMMAND...` runs a command in the machine whose console
//!   is at the socket.
//! - `blanket-agent hold` keeps a VM that never runs, for ever, and says so when it has it.
//! - `blanket-agent nudge` has each processor interrupt the others four times a second, for ever.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use blanket_testbed_agent::client::Client;
use blanket_testbed_agent::server;
use kvm_ioctls::Kvm;
use rustix::fs::OFlags;
use rustix::termios::{OptionalActions, tcdrain, tcgetattr, tcsetattr};
use rustix::thread::{CpuSet, sched_setaffinity};

/// Time for the other end of a socket to answer.
const CONNECT: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match args.as_slice() {
        ["serve", "-"] => serve_stdio(),
        ["serve", device] => serve(Path::new(device)),
        ["relay", socket] => relay(Path::new(socket)),
        ["join", one, other] => join(Path::new(one), Path::new(other)),
        ["client", socket, "--", command @ ..] if !command.is_empty() => {
            client(Path::new(socket), command)
        }
        ["hold"] => hold(),
        ["nudge"] => nudge(),
        _ => {
            eprintln!(
                "usage: blanket-agent serve DEVICE|- | relay SOCKET | join DEVICE DEVICE \
                 | client SOCKET -- COMMAND... | hold | nudge"
            );
            return ExitCode::from(2);
        }
    };
    result.unwrap_or_else(|error| {
        eprintln!("blanket-agent: {error}");
        ExitCode::FAILURE
    })
}

/// Serves the device until the machine ends. It is opened again when it fails: a port may appear
/// late, and a console reports an error when its backend is replaced.
fn serve(device: &Path) -> io::Result<ExitCode> {
    let mut said = String::new();
    loop {
        let problem = match serve_once(device) {
            Ok(()) => String::new(),
            Err(error) => error.to_string(),
        };
        if problem != said {
            eprintln!("blanket-agent: {}: {problem}", device.display());
            said = problem;
        }
        thread::sleep(Duration::from_millis(100));
    }
}

fn serve_once(device: &Path) -> io::Result<()> {
    let port = open(device)?;
    let writer = port.try_clone()?;
    server::serve(port, writer)
}

/// Opens a port, or a console as a raw one.
fn open(device: &Path) -> io::Result<File> {
    // Not as the controlling terminal: what waits there may look like ^C until it is raw, and end
    // this process again and again.
    let port = File::options()
        .read(true)
        .write(true)
        .custom_flags(OFlags::NOCTTY.bits().cast_signed())
        .open(device)?;
    if port.is_terminal() {
        let mut settings = tcgetattr(&port)?;
        settings.make_raw();
        tcsetattr(&port, OptionalActions::Now, &settings)?;
        flush_echoes(&port)?;
    }
    Ok(port)
}

/// Passes bytes between two devices.
fn join(one: &Path, other: &Path) -> io::Result<ExitCode> {
    let (one, other) = (open(one)?, open(other)?);
    let back = (other.try_clone()?, one.try_clone()?);
    let (ended, end) = channel();
    for (from, to) in [(one, other), back] {
        let ended = ended.clone();
        thread::spawn(move || ended.send(pump(Patient(from), to)));
    }
    // The program ends with either direction.
    end.recv().map_err(io::Error::other)??;
    Ok(ExitCode::SUCCESS)
}

/// A port has no end: nobody is connected at times.
struct Patient(File);

impl Read for Patient {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.read(buffer)? {
                0 => thread::sleep(Duration::from_millis(20)),
                len => return Ok(len),
            }
        }
    }
}

/// Has the terminal put out what it still has to echo.
///
/// What arrived before it was raw is echoed, and echoes that find no room (a console's driver
/// takes 256 bytes at a time) wait: they would come out in the middle of a frame. They go first at
/// each write, as far as there is room. Twice 4096 bytes can wait.
fn flush_echoes(mut port: &File) -> io::Result<()> {
    const DELIMITER: [u8; 1] = [0];
    for _ in 0..64 {
        port.write_all(&DELIMITER)?;
        tcdrain(port)?;
    }
    Ok(())
}

/// Serves standard input and output, until the input ends.
fn serve_stdio() -> io::Result<ExitCode> {
    match server::serve(UntilEnd(io::stdin().lock()), io::stdout()) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(ExitCode::SUCCESS),
        Err(error) => Err(error),
        Ok(()) => Ok(ExitCode::SUCCESS),
    }
}

/// A reader whose end is an error: other than on a port, nobody comes back.
struct UntilEnd<R>(R);

impl<R: Read> Read for UntilEnd<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.0.read(buffer) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            result => result,
        }
    }
}

/// Has each processor interrupt the others now and then, by moving there and back.
///
/// QEMU's emulated SVM notes a virtual interrupt, and forgets one, without the lock under which
/// other threads note interrupts for that processor (`do_vmexit`, `helper_vmrun`): one that comes
/// right then is pending and nobody looks. If it is that of the timer of an idle processor, nothing
/// on it wakes up again. The next interrupt brings the lost one along.
fn nudge() -> io::Result<ExitCode> {
    const PERIOD: Duration = Duration::from_millis(250);
    let cpus = thread::available_parallelism()?.get();
    let move_to = |cpu| {
        let mut set = CpuSet::new();
        set.set(cpu);
        sched_setaffinity(None, &set)
    };
    let from = move |own| -> io::Result<()> {
        loop {
            for other in (0..cpus).filter(|other| *other != own) {
                move_to(other)?;
            }
            // The timer is this processor's.
            move_to(own)?;
            thread::sleep(PERIOD);
        }
    };
    let nudgers: Vec<_> = (0..cpus)
        .map(|own| thread::spawn(move || from(own)))
        .collect();
    for nudger in nudgers {
        nudger
            .join()
            .map_err(|_| io::Error::other("a thread ended"))??;
    }
    Ok(ExitCode::SUCCESS)
}

/// Keeps a VM that never runs.
///
/// With the first VM, and again after the last one, Linux changes the code of its scheduler
/// (`preempt_notifier_key`) and of KVM, by way of a breakpoint. A processor that QEMU's translator
/// emulates may keep the breakpoint that it has translated although it is gone: it meets it again
/// and again with interrupts disabled, and the machine stands still. With a VM that is there from
/// before the second processor starts, nothing of that is changed.
fn hold() -> io::Result<ExitCode> {
    let vm = Kvm::new()?.create_vm()?;
    vm.create_irq_chip()?;
    let _vcpu = vm.create_vcpu(0)?;
    println!("held");
    loop {
        thread::park();
    }
}

fn relay(socket: &Path) -> io::Result<ExitCode> {
    let stream = UnixStream::connect(socket)?;
    let outgoing = stream.try_clone()?;
    thread::spawn(move || {
        // However this direction ends, the other one ends with it.
        let _ = pump(io::stdin().lock(), &outgoing);
        let _ = outgoing.shutdown(std::net::Shutdown::Both);
    });
    pump(&stream, io::stdout().lock())?;
    Ok(ExitCode::SUCCESS)
}

fn pump(mut from: impl Read, mut to: impl Write) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let len = from.read(&mut buffer)?;
        if len == 0 {
            return Ok(());
        }
        to.write_all(&buffer[..len])?;
        to.flush()?;
    }
}

fn client(socket: &Path, command: &[&str]) -> io::Result<ExitCode> {
    let stream = UnixStream::connect(socket)?;
    let client = Client::connect_socket(stream, CONNECT).map_err(io::Error::other)?;
    let (program, args) = command.split_first().unwrap_or((&"true", &[]));
    let output = client
        .command(*program)
        .args(args)
        .run()
        .map_err(io::Error::other)?;
    io::stdout().write_all(&output.stdout)?;
    io::stderr().write_all(&output.stderr)?;
    Ok(output
        .status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .map_or(ExitCode::FAILURE, ExitCode::from))
}
