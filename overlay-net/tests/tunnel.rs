//! Tunnels over sockets, and the kernel's VXLAN as a peer, in network
//! namespaces. They need the right to make these; else they say so and pass.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::net::UdpSocket;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use blanket_drivers::uplink::{Kind, Spec, open};
use blanket_overlay::frame::{Frame, Head, Offload, Vni};
use blanket_overlay::tunnel::io::Links;
use blanket_overlay::tunnel::{
    Config, Costs, PathConfig, PeerConfig, PeerId, PublicKey, TrainBuffer, Tunnels, generate,
    public, vxlan,
};

const ONE: &str = "10.9.0.1";
const TWO: &str = "10.9.0.2";

fn new_namespace() -> bool {
    // SAFETY: it takes no pointers, and changes this thread alone.
    let done = unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0;
    if !done {
        eprintln!("skipped: no right to make a network namespace");
    }
    done
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    assert!(status.unwrap().success(), "ip {arguments}");
}

/// Runs one in a namespace with [`ONE`], two in one with [`TWO`], and a cable
/// between them. None: there are no namespaces.
fn cabled<T: Send + 'static>(
    one: impl FnOnce() -> T + Send + 'static,
    two: impl FnOnce() + Send + 'static,
) -> Option<T> {
    let near: JoinHandle<Option<T>> = std::thread::spawn(move || {
        if !new_namespace() {
            return None;
        }
        let (tell, told) = mpsc::channel();
        let (go, gone) = mpsc::channel();
        let far = std::thread::spawn(move || {
            assert!(new_namespace());
            // SAFETY: it takes nothing.
            tell.send(unsafe { libc::gettid() }).unwrap();
            gone.recv().unwrap();
            ip(&format!("addr add {TWO}/24 dev far"));
            ip("link set far up");
            tell.send(0).unwrap();
            two();
        });
        let tid = told.recv().unwrap();
        ip(&format!(
            "link add near type veth peer name far netns {tid}"
        ));
        ip(&format!("addr add {ONE}/24 dev near"));
        ip("link set near up");
        go.send(()).unwrap();
        told.recv().unwrap();
        let value = one();
        far.join().unwrap();
        Some(value)
    });
    near.join().unwrap()
}

struct End {
    tunnels: Tunnels,
    links: Links,
    out: TrainBuffer,
    start: Instant,
}

impl End {
    fn new(private: [u8; 32], (interface, local): (&str, &str), peer: (PublicKey, &str)) -> Self {
        let spec = Spec::new(interface, format!("{local}:4790").parse().unwrap());
        // The cable's carrier may take a moment.
        let uplink = (0..100).find_map(|_| {
            std::thread::sleep(Duration::from_millis(20));
            open(Kind::Udp, &spec).ok()
        });
        let uplink = uplink.unwrap();
        let mut tunnels = Tunnels::new(Config {
            private,
            epoch: Duration::from_secs(1),
            uplinks: vec![uplink.description().capabilities.payload],
            costs: Costs { aes: 1, chacha: 2 },
        });
        let config = PeerConfig {
            public: peer.0,
            psk: None,
            paths: vec![PathConfig {
                uplink: 0,
                remote: format!("{}:4790", peer.1).parse().unwrap(),
                weight: 1,
            }],
        };
        tunnels.add(Duration::ZERO, &config).unwrap();
        Self {
            tunnels,
            links: Links::new(vec![uplink]),
            out: TrainBuffer::default(),
            start: Instant::now(),
        }
    }

    /// One turn of a worker; the frames that came.
    fn turn(&mut self) -> Vec<Vec<u8>> {
        let (now, mut got) = (self.start.elapsed(), Vec::new());
        let each = &mut |_, _, frame: &mut Frame<'_>| got.push(frame.to_vec());
        let (tunnels, out) = (&mut self.tunnels, &mut self.out);
        self.links.receive(now, tunnels, out, each).unwrap();
        tunnels.tick(now, out);
        self.links.send(now, tunnels, out).unwrap();
        got
    }

    fn seal(&mut self, bytes: &mut [u8]) -> bool {
        let (now, head) = (self.start.elapsed(), Head::of(bytes));
        let at = head.bytes().len();
        let body = [(&mut bytes[at..]).into()];
        let frame = Frame {
            head,
            body: &body,
            offload: Offload::default(),
        };
        let vni = Vni::default();
        let sealed = self
            .tunnels
            .seal(now, PeerId(0), vni, 0, &frame, &mut self.out);
        sealed.is_ok()
    }
}

const LENS: [usize; 4] = [60, 1500, 9000, 65_550];

fn frame(number: usize) -> Vec<u8> {
    let mut bytes = vec![number as u8; LENS[number % 4]];
    bytes[..8].copy_from_slice(&(number as u64).to_be_bytes());
    bytes
}

#[test]
fn frames_cross_sockets() {
    const COUNT: usize = 400;
    let keys = [generate(), generate()];
    let publics = keys.map(|key| public(&key));
    let (finish, finished) = mpsc::channel();
    let limit = Instant::now() + Duration::from_secs(120);
    // The second sends each frame back.
    let echo = move || {
        let mut end = End::new(keys[1], ("far", TWO), (publics[0], ONE));
        while finished.try_recv().is_err() && Instant::now() < limit {
            for mut bytes in end.turn() {
                assert!(end.seal(&mut bytes));
            }
        }
    };
    let send = move || {
        let mut end = End::new(keys[0], ("near", ONE), (publics[1], TWO));
        let (mut sent, mut got) = (0, 0);
        while got < COUNT {
            assert!(Instant::now() < limit, "{got} of {sent} came back");
            // A few on the way: sockets have little room.
            while sent < COUNT && sent < got + 8 && end.seal(&mut frame(sent)) {
                sent += 1;
            }
            for bytes in end.turn() {
                assert_eq!(bytes, frame(got), "in order, and as it was");
                got += 1;
            }
        }
        finish.send(()).unwrap();
        let status = end.tunnels.status(end.start.elapsed(), PeerId(0)).unwrap();
        (status, end.links.uplinks()[0].counters())
    };
    if let Some((status, counters)) = cabled(send, echo) {
        assert!(status.stats.in_place > 0, "{status:?}");
        assert!(counters.tx.trains > 0, "{counters:?}");
    }
}

/// What a host with 10.8.0.2 answers: ARP, and echo requests.
fn answer(frame: &[u8]) -> Option<Vec<u8>> {
    let mut reply = frame.to_vec();
    reply[..6].copy_from_slice(&frame[6..12]);
    reply[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 2]);
    match (&frame[12..14], frame.len()) {
        ([8, 6], 42..) if frame[20..22] == [0, 1] && frame[38..42] == [10, 8, 0, 2] => {
            reply[21] = 2;
            reply[32..42].copy_from_slice(&frame[22..32]);
            reply[22..28].copy_from_slice(&[2, 0, 0, 0, 0, 2]);
            reply[28..32].copy_from_slice(&frame[38..42]);
        }
        ([8, 0], 42..) if frame[23] == 1 && frame[34] == 8 => {
            reply[26..30].copy_from_slice(&frame[30..34]);
            reply[30..34].copy_from_slice(&frame[26..30]);
            reply[34] = 0;
            let sum = u32::from(u16::from_be_bytes([frame[36], frame[37]])) + 0x0800;
            let sum = (sum & 0xffff) + (sum >> 16);
            reply[36..38].copy_from_slice(&(sum as u16).to_be_bytes());
        }
        _ => return None,
    }
    Some(reply)
}

fn has_vxlan() -> bool {
    let add = format!("link add vx0 type vxlan id 42 local {ONE} remote {TWO} dstport 4789");
    let status = Command::new("ip").args(add.split(' ')).status();
    status.unwrap().success()
}

#[test]
fn the_kernels_vxlan_understands_ours() {
    let (finish, finished) = mpsc::channel::<()>();
    let host = move || {
        let socket = UdpSocket::bind((TWO, vxlan::PORT)).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_millis(100)))
            .unwrap();
        let mut room = [0; 2000];
        while finished.try_recv() == Err(mpsc::TryRecvError::Empty) {
            let Ok((len, from)) = socket.recv_from(&mut room) else {
                continue;
            };
            let (vni, frame) = vxlan::parse(&mut room[..len]).unwrap();
            assert_eq!(vni.number(), 42);
            let Some(mut reply) = answer(frame) else {
                continue;
            };
            let head = Head::of(&reply);
            let at = head.bytes().len();
            let body = [(&mut reply[at..]).into()];
            let frame = Frame {
                head,
                body: &body,
                offload: Offload::default(),
            };
            let mut out = [0; 2000];
            let len = vxlan::write(vni, &frame, &mut out).unwrap();
            socket
                .send_to(&out[..len], (from.ip(), vxlan::PORT))
                .unwrap();
        }
    };
    let kernel = move || {
        if !has_vxlan() {
            eprintln!("skipped: this kernel has no VXLAN");
            return;
        }
        ip("addr add 10.8.0.1/24 dev vx0");
        ip("link set vx0 up");
        let ping = Command::new("ping")
            .args(["-c", "3", "-i", "0.2", "-w", "20", "-s", "1000", "10.8.0.2"])
            .stdout(Stdio::piped())
            .spawn();
        let output = ping.and_then(Child::wait_with_output).unwrap();
        drop(finish);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains(" 0% packet loss"), "{text}");
    };
    cabled(kernel, host);
}
