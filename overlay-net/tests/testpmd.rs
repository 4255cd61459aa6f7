//! Ports whose front end is DPDK's virtio-user.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use blanket_overlay::port::vhost_user::VhostUser;
use blanket_overlay::port::{BURST, Port};
use blanket_testbed::ensure_packages;

/// Passes frames between two ports until it is dropped.
struct Cable {
    stop: Arc<AtomicBool>,
    lost: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Cable {
    fn new(mut ends: [VhostUser; 2]) -> Self {
        let (stop, lost) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (its, count) = (Arc::clone(&stop), Arc::clone(&lost));
        let thread = std::thread::spawn(move || {
            while !its.load(Ordering::Relaxed) {
                let mut done = 0;
                for from in 0..2 {
                    let [one, two] = &mut ends;
                    let (from, to) = if from == 0 { (one, two) } else { (two, one) };
                    done += from
                        .receive(BURST, &mut |frame| {
                            if to.send(frame).is_err() {
                                count.fetch_add(1, Ordering::Relaxed);
                            }
                        })
                        .unwrap();
                    to.flush().unwrap();
                }
                if done == 0 {
                    std::thread::yield_now();
                }
            }
        });
        Self {
            stop,
            lost,
            thread: Some(thread),
        }
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// testpmd with two ports.
struct Testpmd {
    child: Child,
    input: ChildStdin,
    output: Arc<Mutex<String>>,
}

impl Testpmd {
    fn start(paths: &[PathBuf; 2], options: &str, mode: &str) -> Self {
        ensure_packages(&["dpdk-dev"]).unwrap();
        let ports = paths.iter().enumerate().map(|(i, path)| {
            format!(
                "--vdev=net_virtio_user{i},path={},queues=1{options}",
                path.display()
            )
        });
        // Into a pipe it would say nothing until there is a lot.
        let mut child = Command::new("stdbuf")
            .args(["-oL", "dpdk-testpmd"])
            .args(["--no-huge", "--no-shconf", "--no-telemetry", "--no-pci"])
            .args(["-m", "128", "-l", "0,1"])
            .args(ports)
            .args(["--", "-i", "--no-flush-rx", "--total-num-mbufs=8192"])
            .arg(format!("--forward-mode={mode}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let output = Arc::<Mutex<String>>::default();
        let (its, mut from) = (Arc::clone(&output), child.stdout.take().unwrap());
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(len @ 1..) = from.read(&mut bytes) {
                let text = String::from_utf8_lossy(&bytes[..len]).into_owned();
                its.lock().unwrap().push_str(&text);
            }
        });
        Self {
            input: child.stdin.take().unwrap(),
            child,
            output,
        }
    }

    fn tell(&mut self, command: &str) {
        writeln!(self.input, "{command}").unwrap();
    }

    /// What it says to a command, with `end` in it.
    fn ask(&mut self, command: &str, end: &str) -> String {
        self.output.lock().unwrap().clear();
        self.tell(command);
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let said = self.output.lock().unwrap().clone();
            if let Some((_, rest)) = said.split_once(end)
                && rest.contains("testpmd> ")
            {
                return said;
            }
            assert!(Instant::now() < deadline, "{command}: {said}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Packets received and sent, of each port.
    fn counts(&mut self) -> [(u64, u64); 2] {
        let said = self.ask("show port stats all", "statistics for port 1");
        let all = |name: &str| {
            let found = said.split(name).skip(1);
            let count = |text: &str| text.split_whitespace().next().unwrap().parse().unwrap();
            found.map(count).collect::<Vec<u64>>()
        };
        let (rx, tx) = (all("RX-packets:"), all("TX-packets:"));
        [(rx[0], tx[0]), (rx[1], tx[1])]
    }

    fn wait_for(&mut self, what: &str, done: impl Fn([(u64, u64); 2]) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let counts = self.counts();
            if done(counts) {
                return;
            }
            assert!(Instant::now() < deadline, "no {what}: {counts:?}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn sockets(folder: &Path) -> [PathBuf; 2] {
    ["a", "b"].map(|name| folder.join(name))
}

#[test]
fn packets_go_round_through_virtio_user_and_none_is_lost() {
    // The variants of virtio-user's own data paths, and one that listens itself.
    for options in ["", ",mrg_rxbuf=0", ",in_order=0,queue_size=64", ",server=1"] {
        let folder = tempfile::tempdir().unwrap();
        let paths = sockets(folder.path());
        let meet = match options {
            ",server=1" => VhostUser::connect,
            _ => VhostUser::listen,
        };
        let ends = paths.each_ref().map(|path| meet(path, 1, 1522).unwrap());
        let cable = Cable::new(ends);
        let mut testpmd = Testpmd::start(&paths, options, "io");
        testpmd.tell("start tx_first 1");
        // Each packet goes round and round.
        testpmd.wait_for("packets", |ports| {
            ports.iter().all(|(rx, tx)| *rx > 10_000 && *tx > 10_000)
        });
        assert_eq!(cable.lost.load(Ordering::Relaxed), 0, "{options}");
        testpmd.ask("stop", "Accumulated");
        let [one, two] = testpmd.counts();
        // What the others sent but for what is in the rings.
        for (sent, received) in [(one.1, two.0), (two.1, one.0)] {
            assert!(
                (received..=received + 64).contains(&sent),
                "{one:?} {two:?}"
            );
        }
    }
}
