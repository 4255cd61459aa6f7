//! Several tables, meters, connections, timeouts, traces.

use super::super::meter::{Band, Excess, MeterSpec};
use super::super::text::{dump, parse_packet};
use super::super::{Filter, Gone, Refused, trace};
use super::*;
use crate::frame::key::ethertype;

fn targets(seen: &Seen) -> Vec<Target> {
    seen.sent.iter().map(|(target, _)| *target).collect()
}

fn frame() -> Vec<u8> {
    ethernet(ethertype::IPV4, &ip(false, 6, &tcp(2), 16))
}

fn port(port: u32) -> Target {
    Target::Port(PortId(port))
}

fn of(flows: &[&str]) -> Seen {
    run(&mut pipeline(&control(flows)), &frame(), Offload::default())
}

#[test]
fn tables_follow_each_other_with_what_was_changed() {
    let flows = [
        "tcp,actions=mod_tp_dst:81,resubmit(,1),output:9",
        "table=1,tcp,tp_dst=81,actions=write_metadata:0x10/0xf0,goto_table:2",
        "table=1,actions=output:8",
        "table=2,metadata=0x10/0xf0,actions=output:7,in_port",
    ];
    assert_eq!(targets(&of(&flows)), [port(7), Target::InPort, port(9)]);
}

#[test]
fn what_is_written_is_done_in_the_end() {
    let flows = [
        "actions=write_actions(output:5,mod_dl_dst:02:00:00:00:00:77),goto_table:1",
        "table=1,actions=output:4,write_actions(output:6),goto_table:3",
        "table=3,actions=output:3",
    ];
    let seen = of(&flows);
    assert_eq!(targets(&seen), [port(4), port(3), port(6)]);
    assert_eq!((seen.sent[0].1[5], seen.sent[2].1[5]), (2, 0x77));
    let cleared = [
        "actions=write_actions(output:5),goto_table:1",
        "table=1,actions=clear_actions",
    ];
    assert_eq!(of(&cleared).dropped, [Reason::Flow]);
}

#[test]
fn loops_misses_and_drops_are_told_apart() {
    assert_eq!(
        of(&["actions=resubmit(,0),output:2"]).dropped,
        [Reason::FlowLoop]
    );
    assert_eq!(of(&[]).dropped, [Reason::FlowMiss]);
    assert_eq!(of(&["actions=drop"]).dropped, [Reason::Flow]);
    assert_eq!(
        targets(&of(&["actions=output:1,output:2"])),
        [port(2)],
        "not back"
    );
    assert_eq!(of(&["actions=ct(table=0)"]).dropped, [Reason::FlowLoop]);
}

#[test]
fn meters_limit_and_go_with_their_entries() {
    let mut control = control(&[]);
    let bands = vec![Band {
        rate: 10,
        burst: 2,
        excess: Excess::Drop,
    }];
    let spec = MeterSpec {
        packets: true,
        bands,
    };
    let metered = flow("actions=meter:1,output:2");
    assert_eq!(
        control.add(metered.clone(), Duration::ZERO),
        Err(Refused::NoMeter(1))
    );
    control
        .meter(1, spec, false, Duration::ZERO)
        .expect("a meter");
    control.add(metered, Duration::ZERO).expect("an entry");
    control.publish();
    let mut pipeline = pipeline(&control);
    let dropped = (0..5).map(|_| {
        run(&mut pipeline, &frame(), Offload::default())
            .dropped
            .len()
    });
    assert_eq!(dropped.sum::<usize>(), 3);
    assert_eq!(control.meters()[&1].stats().bands[0].0, 3);
    assert_eq!(control.delete_meter(Some(1)).len(), 1);
    assert!(control.tables().is_empty());
}

#[test]
fn entries_go_when_their_time_is_over() {
    let mut control = control(&[
        "priority=1,hard_timeout=10,actions=output:2",
        "priority=2,tcp,idle_timeout=5,actions=output:3",
    ]);
    let mut pipeline = pipeline(&control);
    let second = Duration::from_secs;
    run_at(&mut pipeline, second(4), 1, &frame(), Offload::default());
    pipeline.tick(second(4));
    assert!(control.expire(second(8)).is_empty());
    let gone = control.expire(second(9));
    assert_eq!(gone.len(), 1);
    assert_eq!((gone[0].1, gone[0].0.stats.packets()), (Gone::Idle, 1));
    control.publish();
    pipeline.tick(second(9));
    let seen = run_at(&mut pipeline, second(9), 1, &frame(), Offload::default());
    assert_eq!(targets(&seen), [port(2)]);
    assert_eq!(control.expire(second(10))[0].1, Gone::Hard);
}

#[test]
fn connections_are_matched_in_a_second_table() {
    let control = control(&[
        "ip,actions=ct(table=1)",
        "table=1,in_port=1,ip,ct_state=+trk+new,actions=ct(commit),output:2",
        "table=1,ip,ct_state=+trk+est,actions=normal",
        "table=1,ip,ct_state=+inv,actions=drop",
    ]);
    let mut pipeline = pipeline(&control);
    let reply = |flags| {
        let mut transport = tcp(flags);
        transport[..4].copy_from_slice(&[0, 80, 0x30, 0x39]);
        let mut packet = ip(false, 6, &transport, 16);
        packet[12..20].copy_from_slice(&[10, 0, 0, 2, 10, 0, 0, 1]);
        ethernet(ethertype::IPV4, &packet)
    };
    let second = Duration::from_secs(1);
    let mut go =
        |port, bytes: &[u8]| run_at(&mut pipeline, second, port, bytes, Offload::default());
    assert_eq!(go(2, &reply(18)).dropped, [Reason::Flow], "nobody asked");
    assert_eq!(targets(&go(1, &frame())), [port(2)]);
    assert_eq!(targets(&go(2, &reply(18))), [Target::Normal]);
    assert_eq!(targets(&go(2, &reply(16))), [Target::Normal]);
}

#[test]
fn what_is_handed_on_through_connections_stays_with_its_frame() {
    let control = control(&[
        "in_port=1,actions=set_field:5->metadata,ct(table=1)",
        "in_port=2,actions=set_field:6->metadata,ct(table=1)",
        "table=1,actions=controller",
    ]);
    let mut pipeline = pipeline(&control);
    for (port, handed) in [(1, 5), (2, 6), (1, 5), (2, 6)] {
        let now = Duration::from_secs(1);
        let seen = run_at(&mut pipeline, now, port, &frame(), Offload::default());
        let Target::Controller(what) = seen.sent[0].0 else {
            panic!("{:?}", seen.sent)
        };
        assert_eq!(what.metadata, handed);
    }
}

#[test]
fn workers_see_changes_and_nothing_is_counted_twice() {
    const FRAMES: u64 = 5000;
    let mut control = control(&["tcp,actions=output:2", "priority=1,actions=drop"]);
    let (key, _) =
        super::super::text::parse_packet("in_port=1,tcp,tp_dst=80", &super::super::text::no_names)
            .expect("a packet");
    let worker = |control: &Control| {
        let mut pipeline = pipeline(control);
        move || {
            for index in 0..FRAMES {
                let now = Duration::from_micros(index);
                pipeline.tick(now);
                let decision = pipeline.classify(now, &key, 100);
                assert!(decision.drop.is_none() && decision.steps.len() == 1);
            }
            pipeline.fold(Duration::ZERO);
        }
    };
    let workers = [(); 3].map(|()| std::thread::spawn(worker(&control)));
    let filter = Filter {
        matches: flow("tcp,actions=drop").matches,
        ..Filter::default()
    };
    for port in 3..200 {
        let changed = control.modify(&filter, &flow(&format!("actions={port}")).actions, false);
        assert_eq!(changed, Ok(1));
        control.publish();
        std::thread::yield_now();
    }
    for worker in workers {
        worker.join().expect("a worker");
    }
    let entries = control.tables().entries();
    let counted = entries.iter().map(|entry| entry.stats.packets());
    assert_eq!(counted.collect::<Vec<_>>(), [3 * FRAMES, 0]);
}

#[test]
fn a_trace_tells_which_entries_are_hit() {
    let control = control(&[
        "priority=100,cookie=0x7,tcp,nw_dst=10.0.0.0/8,actions=mod_nw_dst:10.1.1.1,goto_table:4",
        "table=4,ip,nw_dst=10.1.1.1,actions=output:3",
    ]);
    let (key, state) = parse_packet(
        "in_port=1,tcp,nw_src=1.1.1.1,nw_dst=10.2.2.2,tp_dst=80",
        &super::super::text::no_names,
    )
    .expect("a packet");
    let trace = trace(control.tables(), &key, state).to_string();
    for wanted in [
        "Flow: tcp,in_port=1,nw_src=1.1.1.1,nw_dst=10.2.2.2,nw_ttl=64,tp_dst=80",
        " 0. tcp,nw_dst=10.0.0.0/8, priority 100, cookie 0x7\n    set_field:10.1.1.1->ip_dst\n",
        " 4. ip,nw_dst=10.1.1.1, priority 32768\n    output:3\n",
        "Decision: set_field:10.1.1.1->ip_dst,output:3",
    ] {
        assert!(trace.contains(wanted), "{wanted}\nis not in\n{trace}");
    }
    let drop = trace_of("in_port=2,arp", &control);
    assert!(drop.contains(" 0. No match: it is dropped.") && drop.contains("drop (flow_miss)"));
}

fn trace_of(text: &str, control: &Control) -> String {
    let (key, state) = parse_packet(text, &super::super::text::no_names).expect("a packet");
    trace(control.tables(), &key, state).to_string()
}

#[test]
fn entries_are_shown_as_open_vswitch_does() {
    let control = control(&[
        "cookie=0x5,table=3,idle_timeout=9,priority=7,udp,tp_dst=53,\
                             dl_vlan=4,actions=normal",
    ]);
    let entries = control.tables().entries();
    assert_eq!(
        dump(entries[0], Duration::from_millis(1500)),
        "cookie=0x5, duration=1.500s, table=3, n_packets=0, n_bytes=0, idle_age=1, \
         idle_timeout=9, priority=7,udp,dl_vlan=4,tp_dst=53 actions=NORMAL"
    );
    assert!(control.select(&Filter::default()).len() == 1);
}
