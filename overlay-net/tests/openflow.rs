//! OpenFlow with real tools: Open vSwitch's `ovs-ofctl`, and os-ken's learning
//! switch as a controller.

#![allow(clippy::expect_used, reason = "a test that cannot go on fails")]

use std::io::{self, BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use blanket_overlay::flow::openflow::server::{Endpoint, Reach};
use blanket_overlay::flow::openflow::{
    Datapath, Description, Event, Hub, PacketIn, PortInfo, PortStats,
};
use blanket_overlay::flow::text::actions_text;
use blanket_overlay::flow::{Action, Control, Filter, ToController};
use blanket_overlay::frame::{Mac, PortId};

/// A switch that only remembers what it is told.
struct Switch {
    start: Instant,
    control: Control,
    out: Vec<(Option<PortId>, String, Vec<u8>)>,
    down: bool,
}

impl Datapath for Switch {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn id(&self) -> u64 {
        0x1234
    }

    fn description(&self) -> Description {
        Description {
            manufacturer: "Blanket".into(),
            datapath: "br0".into(),
            ..Description::default()
        }
    }

    fn ports(&self) -> Vec<PortInfo> {
        let port = |id: u32| PortInfo {
            id: PortId(id),
            name: format!("web{id}"),
            mac: Mac([2, 0, 0, 0, 0, id as u8]),
            down: self.down && id == 1,
            unplugged: false,
            stats: PortStats {
                rx_packets: 7,
                ..PortStats::default()
            },
        };
        vec![port(1), port(2)]
    }

    fn control(&mut self) -> &mut Control {
        &mut self.control
    }

    fn packet_out(&mut self, port: Option<PortId>, actions: &[Action], frame: &[u8]) {
        self.out.push((port, actions_text(actions), frame.to_vec()));
    }

    fn set_down(&mut self, port: PortId, down: bool) -> bool {
        self.down = down;
        port == PortId(1)
    }
}

/// The way to it.
#[derive(Clone)]
struct Way(Arc<Mutex<Switch>>);

impl Reach for Way {
    async fn with<R: Send + 'static>(
        &self,
        act: impl FnOnce(&mut dyn Datapath) -> R + Send + 'static,
    ) -> io::Result<R> {
        Ok(act(&mut *self.0.lock().expect("sound")))
    }
}

/// Threads that serve controllers, until it is dropped.
struct Running {
    address: SocketAddr,
    _runtime: tokio::runtime::Runtime,
}

fn runtime() -> tokio::runtime::Runtime {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let builder = builder.worker_threads(1).enable_all();
    builder.build().expect("a runtime")
}

/// Waits for controllers.
fn listen(endpoint: Endpoint<Way>) -> Running {
    let runtime = runtime();
    let bound = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"));
    let listener = bound.expect("a listener");
    let address = listener.local_addr().expect("an address");
    runtime.spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let endpoint = endpoint.clone();
            tokio::spawn(async move { endpoint.serve(stream, || ()).await });
        }
    });
    Running {
        address,
        _runtime: runtime,
    }
}

/// Connects to a controller, as soon as there is one.
fn connect(endpoint: Endpoint<Way>, address: SocketAddr) -> Running {
    let runtime = runtime();
    runtime.spawn(async move {
        loop {
            if let Ok(stream) = tokio::net::TcpStream::connect(address).await {
                let _ = endpoint.serve(stream, || ()).await;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    Running {
        address,
        _runtime: runtime,
    }
}

fn switch() -> (Arc<Mutex<Switch>>, Hub, Endpoint<Way>) {
    let switch = Arc::new(Mutex::new(Switch {
        start: Instant::now(),
        control: Control::new(),
        out: Vec::new(),
        down: false,
    }));
    let hub = Hub::default();
    let endpoint = Endpoint::new(Way(switch.clone()), hub.clone());
    (switch, hub, endpoint)
}

fn has_ofctl() -> bool {
    let found = Command::new("ovs-ofctl").arg("--version").output().is_ok();
    if !found {
        println!("skipped, because there is no ovs-ofctl (package openvswitch-common)");
    }
    found
}

fn target(address: SocketAddr) -> String {
    format!("tcp:127.0.0.1:{}", address.port())
}

/// Runs `ovs-ofctl`; what it says, and whether it succeeded.
fn ofctl(address: SocketAddr, args: &[&str]) -> (bool, String) {
    let output = Command::new("ovs-ofctl")
        .args(["-O", "OpenFlow13", args[0]])
        .arg(target(address))
        .args(&args[1..])
        .output()
        .expect("ovs-ofctl");
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

fn sound(address: SocketAddr, args: &[&str]) -> String {
    let (success, text) = ofctl(address, args);
    assert!(success && !text.contains("OFPT_ERROR"), "{args:?}: {text}");
    text
}

#[test]
fn ovs_ofctl_adds_shows_changes_and_deletes_entries() {
    if !has_ofctl() {
        return;
    }
    let (_switch, _hub, endpoint) = switch();
    let running = listen(endpoint);
    let at = running.address;
    sound(
        at,
        &[
            "add-meter",
            "meter=3,kbps,burst,band=type=drop,rate=1000,burst_size=100",
        ],
    );
    let flows = [
        "priority=100,ip,nw_dst=10.0.0.0/8 actions=output:2",
        "priority=99,tcp,nw_src=1.2.3.4,tp_dst=80 actions=set_field:10.1.2.3->ip_dst,set_field:81->tcp_dst,output:1",
        "priority=98,in_port=1,dl_vlan=5 actions=pop_vlan,NORMAL",
        "priority=97,dl_dst=01:00:00:00:00:00/01:00:00:00:00:00 actions=FLOOD",
        "priority=96,ipv6,ipv6_dst=fd00::/16 actions=dec_ttl,IN_PORT",
        "priority=95,arp,arp_tpa=10.0.0.1,arp_op=1 actions=CONTROLLER:65535",
        "priority=94,udp,tp_dst=0x100/0xff00 actions=meter:3,output:2",
        "priority=93,ip,nw_frag=later actions=drop",
        "priority=92,tcp,tcp_flags=+syn-ack actions=resubmit(,4)",
        "priority=91,ct_state=-trk,ip actions=ct(table=2)",
        "priority=90,metadata=0x5,tun_id=0x7 actions=write_metadata:0x1/0xff,goto_table:1",
        "priority=89,vlan_tci=0x0000/0x1fff actions=push_vlan:0x8100,set_field:4101->vlan_vid,output:2",
        "priority=88,icmp6,icmp_type=135,nd_target=fd00::1 actions=clear_actions,write_actions(output:1)",
        "priority=87,icmp,icmp_type=8,icmp_code=0,nw_ttl=3 actions=ALL",
        "priority=86,ip actions=set_field:10.0.0.0/255.0.0.0->ip_src,output:2",
        "priority=85,sctp,tp_src=9,ip_dscp=10,nw_ecn=1 actions=output:2",
        "cookie=0x9,idle_timeout=60,hard_timeout=90,priority=84,rarp actions=output:2",
        "table=1,priority=7 actions=NORMAL",
    ];
    for flow in flows {
        sound(at, &["add-flow", flow]);
    }
    let text = sound(at, &["dump-flows", "--names"]);
    assert_eq!(
        text.lines()
            .filter(|line| line.contains("actions="))
            .count(),
        flows.len(),
        "{text}"
    );
    let dump = sound(at, &["dump-flows"]);
    for wanted in [
        "priority=100,ip,nw_dst=10.0.0.0/8 actions=output:2",
        "priority=99,tcp,nw_src=1.2.3.4,tp_dst=80 actions=set_field:10.1.2.3->ip_dst,set_field:81->tcp_dst,output:1",
        "priority=98,in_port=1,dl_vlan=5 actions=pop_vlan,NORMAL",
        "priority=97,dl_dst=01:00:00:00:00:00/01:00:00:00:00:00 actions=FLOOD",
        "priority=96,ipv6,ipv6_dst=fd00::/16 actions=dec_ttl,IN_PORT",
        "priority=95,arp,arp_tpa=10.0.0.1,arp_op=1 actions=CONTROLLER:65535",
        "priority=94,udp,tp_dst=0x100/0xff00 actions=meter:3,output:2",
        "priority=93,ip,nw_frag=later actions=drop",
        "tcp_flags=+syn-ack actions=resubmit(,4)",
        "ct_state=-trk,ip actions=ct(table=2)",
        "priority=90,tun_id=0x7,metadata=0x5 actions=write_metadata:0x1/0xff,goto_table:1",
        "actions=push_vlan:0x8100,set_field:4101->vlan_vid,output:2",
        "icmp6,icmp_type=135,nd_target=fd00::1 actions=clear_actions,write_actions(output:1)",
        "icmp,nw_ttl=3,icmp_type=8,icmp_code=0 actions=ALL",
        "set_field:10.0.0.0/8->ip_src",
        "priority=85,sctp,nw_tos=40,nw_ecn=1,tp_src=9 actions=output:2",
        "cookie=0x9,",
        "idle_timeout=60, hard_timeout=90, priority=84,rarp actions=output:2",
        "table=1, n_packets=0, n_bytes=0, priority=7 actions=NORMAL",
    ] {
        assert!(dump.contains(wanted), "{wanted}\nis not in\n{dump}");
    }
    sound(at, &["mod-flows", "priority=84,rarp actions=output:1"]);
    assert!(sound(at, &["dump-flows", "rarp"]).contains("actions=output:1"));
    sound(at, &["del-flows", "--strict", "priority=84,rarp"]);
    sound(at, &["del-flows", "cookie=0x0/-1,tcp"]);
    let left = sound(at, &["dump-aggregate"]);
    assert!(
        left.contains(&format!("flow_count={}", flows.len() - 3)),
        "{left}"
    );
    sound(at, &["del-flows"]);
    assert!(sound(at, &["dump-aggregate"]).contains("flow_count=0"));
}

#[test]
fn ovs_ofctl_shows_ports_tables_and_meters_and_is_told_errors() {
    if !has_ofctl() {
        return;
    }
    let (_switch, _hub, endpoint) = switch();
    let running = listen(endpoint);
    let at = running.address;
    let show = sound(at, &["show"]);
    for wanted in [
        "dpid:0000000000001234",
        "n_tables:254",
        "1(web1): addr:02:00:00:00:00:01",
    ] {
        assert!(show.contains(wanted), "{show}");
    }
    assert!(sound(at, &["dump-desc"]).contains("Manufacturer: Blanket"));
    assert!(sound(at, &["dump-ports-desc"]).contains("2(web2)"));
    assert!(sound(at, &["dump-ports"]).contains("rx pkts=7"));
    assert!(sound(at, &["dump-tables"]).contains("table 0"));
    assert!(sound(at, &["dump-table-features"]).contains("max_entries=262144"));
    sound(at, &["probe"]);
    sound(at, &["ping"]);
    sound(at, &["queue-stats"]);
    sound(at, &["dump-groups"]);
    sound(at, &["mod-port", "1", "down"]);
    assert!(sound(at, &["dump-ports-desc"]).contains("PORT_DOWN"));
    sound(
        at,
        &[
            "add-meter",
            "meter=1,pktps,stats,band=type=dscp_remark,rate=10,prec_level=1",
        ],
    );
    let meters = sound(at, &["dump-meters"]);
    assert!(
        meters.contains("meter=1 pktps") && meters.contains("type=dscp_remark rate=10"),
        "{meters}"
    );
    assert!(sound(at, &["meter-stats"]).contains("meter:1"));
    assert!(sound(at, &["meter-features"]).contains("max_meter:4096"));
    sound(at, &["mod-meter", "meter=1,pktps,band=type=drop,rate=20"]);
    sound(at, &["del-meters"]);
    for (args, error) in [
        (
            &["add-flow", "actions=meter:9,output:1"][..],
            "OFPMMFC_UNKNOWN_METER",
        ),
        (
            &["add-flow", "check_overlap,actions=local"],
            "OFPBAC_BAD_OUT_PORT",
        ),
        (
            &["add-group", "group_id=1,type=all,bucket=output:1"],
            "OFPGMFC_OUT_OF_GROUPS",
        ),
        (&["mod-port", "2", "down"], "OFPPMFC_BAD_CONFIG"),
        (&["add-flow", "mpls,actions=drop"], ""),
        (
            &["add-flow", "ipv6,ipv6_label=3,actions=drop"],
            "OFPBMC_BAD_FIELD",
        ),
    ] {
        let (_, text) = ofctl(at, args);
        assert!(text.contains(error), "{args:?}: {text}");
    }
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn packet(port: u32, dst: u8, src: u8) -> Event {
    let mut frame = vec![2, 0, 0, 0, 0, dst, 2, 0, 0, 0, 0, src, 0x88, 0xb5];
    frame.resize(60, 0);
    Event::Packet(PacketIn {
        port: PortId(port),
        vni: 0,
        what: ToController {
            max_len: 0xffff,
            miss: true,
            table: 0,
            cookie: 0,
            metadata: 0,
        },
        frame: frame.into(),
    })
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "{what}: it has not come"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn ovs_ofctl_monitors_frames_and_sends_them() {
    if !has_ofctl() {
        return;
    }
    let (switch, hub, endpoint) = switch();
    let running = listen(endpoint);
    let at = running.address;
    let mut monitor = Command::new("ovs-ofctl")
        .args([
            "-O",
            "OpenFlow13",
            "monitor",
            &target(at),
            "65535",
            "--unixctl=none",
        ])
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("ovs-ofctl");
    let said = BufReader::new(monitor.stderr.take().expect("a pipe"));
    let _monitor = Killed(monitor);
    wait("the monitor comes", || {
        std::thread::sleep(Duration::from_millis(200));
        hub.send(&packet(1, 2, 1)).is_ok()
    });
    let line = said
        .lines()
        .map_while(Result::ok)
        .find(|line| line.contains("OFPT_PACKET_IN"))
        .expect("a frame");
    assert!(
        line.contains("total_len=60 in_port=1 (via no_match)"),
        "{line}"
    );

    let frame = "020000000002020000000001 88b5 0000".replace(' ', "");
    sound(
        at,
        &[
            "packet-out",
            &format!("in_port=1 packet={frame} actions=output:2"),
        ],
    );
    wait("the frame is sent", || {
        !switch.lock().expect("sound").out.is_empty()
    });
    let out = switch.lock().expect("sound").out.remove(0);
    assert_eq!(
        (out.0, out.1.as_str(), out.2.len()),
        (Some(PortId(1)), "output:2", 16)
    );
}

/// A Python that has os-ken: the one in the path, or Debian's.
fn os_ken() -> Option<String> {
    let named = std::env::var("BLANKET_OS_KEN_PYTHON").ok();
    let pythons = match named {
        Some(python) => vec![python],
        None => vec!["python3".into(), "/usr/bin/python3".into()],
    };
    let has = |python: &String| {
        let import = Command::new(python)
            .args(["-c", "import os_ken.base.app_manager"])
            .output();
        import.is_ok_and(|output| output.status.success())
    };
    let found = pythons.into_iter().find(has);
    if found.is_none() {
        println!(
            "skipped, because no Python here has os-ken (package python3-os-ken; \
             BLANKET_OS_KEN_PYTHON names another Python)"
        );
    }
    found
}

#[test]
fn os_kens_learning_switch_controls_it() {
    let Some(python) = os_ken() else { return };
    let (switch, hub, endpoint) = switch();
    let port = TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("a free port")
        .port();
    let program = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/learning_switch.py");
    let controller = Command::new(python)
        .args(["-B", program, &port.to_string()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("os-ken");
    let _controller = Killed(controller);
    let _running = connect(endpoint, SocketAddr::from(([127, 0, 0, 1], port)));
    let dump = || {
        let control = &switch.lock().expect("sound").control;
        let entries = control.select(&Filter::default());
        let texts = entries.iter().map(|entry| entry.flow.to_string());
        texts.collect::<Vec<_>>().join("\n")
    };
    wait("the entry for frames that nothing else matches", || {
        dump() == "priority=0 actions=CONTROLLER:65535"
    });
    let out = |wanted: &str| {
        let found = switch.lock().expect("sound").out.pop();
        found.is_some_and(|(_, actions, frame)| {
            assert_eq!((actions.as_str(), frame.len()), (wanted, 60));
            true
        })
    };
    // Who is unknown is flooded to; who has been heard gets an entry.
    assert_eq!(hub.send(&packet(1, 2, 1)), Ok(()));
    wait("a flood", || out("FLOOD"));
    assert_eq!(hub.send(&packet(2, 1, 2)), Ok(()));
    wait("the answer", || out("output:1"));
    let learnt =
        "priority=1,in_port=2,dl_src=02:00:00:00:00:02,dl_dst=02:00:00:00:00:01 actions=output:1";
    wait("an entry", || dump().contains(learnt));
}
