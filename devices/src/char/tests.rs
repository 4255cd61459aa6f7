use super::*;
use crate::worker::{Handler, Worker};
use event_manager::MutEventSubscriber;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Mutex;
use vmm_sys_util::eventfd::EventFd;

/// A device that keeps what comes in, as far as it is let.
struct Probe {
    port: CharPort,
    kick: EventFd,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// Output to write at the next kick, and whether to wait for room.
    output: Mutex<Vec<u8>>,
    lossless: bool,
    /// Bytes that may be read.
    credit: Mutex<usize>,
    input: Mutex<Vec<u8>>,
}

impl MutEventSubscriber for Probe {
    fn init(&mut self, ops: &mut EventOps) {
        ops.add(Events::with_data(&self.kick, 0, EventSet::IN))
            .unwrap();
        self.port.init(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if CharPort::owns(&events) {
            self.port.process(&events, ops);
        } else {
            self.kick.read().unwrap();
        }
        let mut output = self.shared.output.lock().unwrap();
        while !output.is_empty() {
            let n = if self.shared.lossless {
                self.port.room().min(output.len())
            } else {
                output.len()
            };
            if n == 0 {
                break;
            }
            self.port.write(&output[..n]);
            output.drain(..n);
        }
        let mut credit = self.shared.credit.lock().unwrap();
        let mut buffer = [0; 4096];
        loop {
            let room = (*credit).min(buffer.len());
            let n = self.port.read(&mut buffer[..room]);
            if n == 0 {
                break;
            }
            *credit -= n;
            self.shared.input.lock().unwrap().extend(&buffer[..n]);
        }
        self.port.want_input(*credit > 0);
        self.port.sync(ops);
    }
}

impl Handler for Probe {}

struct Rig {
    worker: Worker,
    kick: EventFd,
    shared: Arc<Shared>,
    metrics: Arc<Metrics>,
    path: PathBuf,
    folder: tempfile::TempDir,
}

impl Rig {
    fn new(lossless: bool, log: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console");
        let port = CharPort::open(&Spec {
            stdio: false,
            socket: Some(path.clone()),
            log: log.then(|| folder.path().join("log")),
        })
        .unwrap();
        let kick = EventFd::new(0).unwrap();
        let shared = Arc::new(Shared {
            lossless,
            ..Shared::default()
        });
        let worker = Worker::spawn("char", Box::new(|| Ok(()))).unwrap();
        let metrics = Arc::clone(port.metrics());
        worker
            .add(Box::new(Probe {
                port,
                kick: kick.try_clone().unwrap(),
                shared: Arc::clone(&shared),
            }))
            .unwrap();
        Self {
            worker,
            kick,
            shared,
            metrics,
            path,
            folder,
        }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        stream
    }

    fn say(&self, bytes: &[u8]) {
        self.shared.output.lock().unwrap().extend(bytes);
        self.kick.write(1).unwrap();
        if !self.shared.lossless {
            until(|| self.shared.output.lock().unwrap().is_empty());
        }
    }

    fn listen_for(&self, bytes: usize) {
        *self.shared.credit.lock().unwrap() += bytes;
        self.kick.write(1).unwrap();
    }

    fn input(&self) -> Vec<u8> {
        self.shared.input.lock().unwrap().clone()
    }
}

fn until(mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < deadline, "not within 30 s");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn take(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 % 253) as u8).collect()
}

#[test]
fn a_new_client_sees_the_last_output_and_then_what_follows() {
    let rig = Rig::new(false, false);
    let past = pattern(SCROLLBACK + 100);
    rig.say(&past);
    let mut client = rig.connect();
    assert_eq!(take(&mut client, SCROLLBACK), past[100..]);
    rig.say(b"login: ");
    assert_eq!(take(&mut client, 7), b"login: ");
    assert_eq!(rig.metrics.dropped.load(Ordering::Relaxed), 100);
}

#[test]
fn a_second_client_is_told_so_until_the_first_one_leaves() {
    let rig = Rig::new(false, false);
    rig.say(b"x");
    let mut first = rig.connect();
    assert_eq!(take(&mut first, 1), b"x");
    let mut told = String::new();
    rig.connect().read_to_string(&mut told).unwrap();
    assert!(told.starts_with("busy"), "{told}");
    drop(first);
    until(|| {
        let mut next = rig.connect();
        take(&mut next, 1) == b"x"
    });
}

#[test]
fn a_slow_client_loses_the_oldest_bytes_and_they_are_counted() {
    let rig = Rig::new(false, false);
    rig.say(b"x");
    let mut client = rig.connect();
    take(&mut client, 1);
    let said = pattern(4 << 20);
    for part in said.chunks(1 << 16) {
        rig.say(part);
    }
    let lost = rig.metrics.dropped.load(Ordering::Relaxed) as usize;
    assert!(lost > 0);
    let got = take(&mut client, said.len() - lost);
    assert_eq!(
        got[got.len() - BUFFER / 2..],
        said[said.len() - BUFFER / 2..]
    );
}

#[test]
fn a_device_that_heeds_the_room_loses_nothing_to_a_slow_client() {
    let rig = Rig::new(true, false);
    rig.say(b"x");
    let mut client = rig.connect();
    take(&mut client, 1);
    let said = pattern(4 << 20);
    rig.say(&said);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(take(&mut client, said.len()), said);
    assert_eq!(rig.metrics.dropped.load(Ordering::Relaxed), 0);
}

#[test]
fn input_waits_with_its_sender_and_arrives_after_the_sender_has_gone() {
    let rig = Rig::new(false, false);
    let sent = pattern(50_000);
    let mut client = rig.connect();
    client.write_all(&sent).unwrap();
    drop(client);
    std::thread::sleep(Duration::from_millis(10));
    assert!(rig.input().is_empty());
    rig.listen_for(20_000);
    until(|| rig.input().len() == 20_000);
    rig.listen_for(60_000);
    until(|| rig.input().len() == 50_000);
    assert_eq!(rig.input(), sent);
}

#[test]
fn a_client_that_left_unread_input_behind_gives_way_to_the_next() {
    let rig = Rig::new(false, false);
    rig.say(b"x");
    let mut first = rig.connect();
    take(&mut first, 1);
    first.write_all(b"unread").unwrap();
    drop(first);
    until(|| take(&mut rig.connect(), 1) == b"x");
}

#[test]
fn a_client_that_has_said_all_still_listens() {
    let rig = Rig::new(false, false);
    rig.listen_for(100);
    let mut client = rig.connect();
    client.write_all(b"go").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    until(|| rig.input() == b"go");
    rig.say(b"done");
    assert_eq!(take(&mut client, 4), b"done");
}

#[test]
fn the_socket_is_for_its_owner_only_and_goes_with_the_port() {
    let rig = Rig::new(false, false);
    let found = std::fs::metadata(&rig.path).unwrap();
    assert!(found.file_type().is_socket());
    assert_eq!(found.permissions().mode() & 0o777, 0o600);
    drop(rig.worker);
    assert!(!rig.path.exists());
}

fn open_at(path: &Path) -> Result<CharPort, Error> {
    CharPort::open(&Spec {
        socket: Some(path.to_owned()),
        ..Spec::default()
    })
}

#[test]
fn a_dead_socket_is_replaced_a_living_one_and_a_file_are_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let port = open_at(&path).unwrap();
    assert!(matches!(open_at(&path), Err(Error::InUse(_))));
    drop(port);
    std::fs::write(&path, "precious").unwrap();
    assert!(matches!(open_at(&path), Err(Error::NotASocket(_))));
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    let long = folder.path().join("x".repeat(108));
    assert!(matches!(open_at(&long), Err(Error::PathTooLong(_))));
    let nowhere = folder.path().join("no/folder");
    assert!(matches!(open_at(&nowhere), Err(Error::Socket { .. })));
}

#[test]
fn the_log_is_continued_and_starts_anew_before_it_outgrows_its_limit() {
    let rig = Rig::new(false, true);
    let path = rig.folder.path().join("log");
    rig.say(b"one ");
    assert_eq!(rig.metrics.dropped.load(Ordering::Relaxed), 0);
    let mut log = Log::open(&path).unwrap();
    assert!(log.write(b"two "));
    assert_eq!(std::fs::read(&path).unwrap(), b"one two ");
    let block = vec![b'x'; 1 << 20];
    for _ in 0..15 {
        assert!(log.write(&block));
    }
    assert!(log.write(&block[8..]));
    assert_eq!(std::fs::metadata(&path).unwrap().len(), LOG_LIMIT);
    assert!(log.write(b"!"));
    assert_eq!(std::fs::read(&path).unwrap(), b"!");
}

#[test]
fn an_outbox_keeps_the_newest_bytes() {
    let mut outbox = Outbox::new(4);
    assert_eq!(outbox.push(b"abc"), 0);
    assert_eq!((outbox.push(b"de"), outbox.room()), (1, 0));
    assert_eq!(outbox.to_vec(), b"bcde");
    assert_eq!(outbox.push(b"123456"), 6);
    assert_eq!(outbox.take(), b"3456");
    assert!(outbox.is_empty());
}

/// Set in the process that has a terminal of its own.
const CHILD: &str = "BLANKET_TEST_TERMINAL";

/// Repeats each key in brackets; ends at `q` without a proper halt.
fn repeat_keys() -> ! {
    let mut port = CharPort::open(&Spec {
        stdio: true,
        ..Spec::default()
    })
    .unwrap();
    let (columns, rows) = port.size().unwrap();
    port.write(format!("ready {columns}x{rows};").as_bytes());
    loop {
        let mut key = [0];
        match (port.read(&mut key), key[0]) {
            (0, _) => std::thread::sleep(Duration::from_millis(1)),
            (_, b'q') => std::process::exit(0),
            (_, key) => port.write(format!("[{key}]").as_bytes()),
        }
    }
}

fn is_raw(terminal: &impl std::os::fd::AsRawFd) -> bool {
    // SAFETY: `mode` is one termios, for which all zeros are valid.
    let mode = unsafe {
        let mut mode: libc::termios = std::mem::zeroed();
        assert_eq!(libc::tcgetattr(terminal.as_raw_fd(), &mut mode), 0);
        mode
    };
    mode.c_lflag & (libc::ICANON | libc::ECHO | libc::ISIG) == 0
}

#[test]
fn a_terminal_passes_every_key_on_and_has_its_mode_back_at_exit() {
    use std::os::fd::{FromRawFd, OwnedFd};
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};

    if std::env::var_os(CHILD).is_some() {
        repeat_keys();
    }
    let size = libc::winsize {
        ws_row: 40,
        ws_col: 100,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let (mut ours, mut theirs) = (-1, -1);
    // SAFETY: the pointers are to two integers and a winsize, or null.
    let (mut terminal, inside) = unsafe {
        let null = std::ptr::null_mut();
        assert_eq!(
            libc::openpty(&mut ours, &mut theirs, null, null.cast(), &size),
            0
        );
        // The child must not hold its own terminal open: it ends with this test.
        libc::fcntl(ours, libc::F_SETFD, libc::FD_CLOEXEC);
        (
            std::fs::File::from(OwnedFd::from_raw_fd(ours)),
            OwnedFd::from_raw_fd(theirs),
        )
    };
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "--nocapture"])
        .arg("char::tests::a_terminal_passes_every_key_on_and_has_its_mode_back_at_exit")
        .env(CHILD, "1")
        .stdin(Stdio::from(inside.try_clone().unwrap()))
        .stdout(Stdio::from(inside.try_clone().unwrap()));
    // SAFETY: both calls are allowed between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::setsid();
            libc::ioctl(0, libc::TIOCSCTTY, 0);
            Ok(())
        });
    }
    assert!(!is_raw(&inside));
    let mut child = command.spawn().unwrap();
    let mut seen: Vec<u8> = Vec::new();
    let mut wait_for = |terminal: &mut std::fs::File, text: &str| {
        while !seen.windows(text.len()).any(|part| part == text.as_bytes()) {
            let mut buffer = [0; 256];
            let n = terminal.read(&mut buffer).unwrap();
            seen.extend(&buffer[..n]);
        }
    };
    wait_for(&mut terminal, "ready 100x40;");
    assert!(is_raw(&inside));
    // Ctrl-C is a key like any other, and none waits for a line's end.
    terminal.write_all(b"a\x03").unwrap();
    wait_for(&mut terminal, "[97][3]");
    terminal.write_all(b"q").unwrap();
    assert!(child.wait().unwrap().success());
    assert!(!is_raw(&inside));
}
