//! Guests that are paused move, and stay paused.

use super::*;

/// What `blanket ps` calls the state of a VM.
fn state(vm: &Vm) -> Value {
    vm.info().unwrap()["state"].clone()
}

#[test]
fn a_paused_guest_is_paused_where_it_arrives_and_goes_on_there() {
    natively(
        || native("paused").unwrap(),
        |host| {
            let mut vm = pv(host, "here");
            let guest = vm.guest().unwrap();
            begins_load(&guest, "/dev/xvda");
            goes_on(&guest);
            vm.blanket("pause", "").unwrap();
            drop(guest);
            // Cancelled, it is where it was, and as it was.
            let cancel = "blanket migrate here --as there --console socket=/run/there.console \
                          --bandwidth 2M --compress off & sleep 2; kill -INT $!; ! wait $!";
            host.sh(cancel).text().unwrap();
            assert_eq!(state(&vm), "paused");
            for (new, flags) in [
                ("there", "--verify"),
                ("here", "--mode post-copy"),
                ("there", "--mode pre-copy --verify --dirty log"),
                ("here", "--verify"),
            ] {
                let (moved, report) = vm.migrate(new, flags).unwrap();
                println!("{report}");
                is_sound(&report);
                assert_eq!(report["paused"], true, "{report}");
                vm = moved;
                assert_eq!(state(&vm), "paused");
                assert_eq!(vms(host), 1);
            }
            vm.blanket("resume", "").unwrap();
            let guest = vm.guest().unwrap();
            goes_on(&guest);
            // From here on it is like any other.
            let (moved, report) = vm.migrate("there", "--verify --downtime 500").unwrap();
            assert_eq!(report["paused"], false, "{report}");
            assert_eq!(state(&moved), "running");
            drop(guest);
            let guest = moved.guest().unwrap();
            goes_on(&guest);
            ends_load(&guest);
            drop(guest);
            moved.blanket("rm", "--force").unwrap();
        },
    );
}

#[test]
fn a_paused_guest_moves_to_another_node_with_its_disks() {
    natively(
        || Member::nodes("paused").unwrap(),
        |host| {
            let [a, b] = Member::two(host);
            let vm = between_nodes::starts(host, &a);
            let guest = vm.guest().unwrap();
            begins_load(&guest, "/dev/xvda");
            goes_on(&guest);
            drop(guest);
            a.says("pause web");
            for (from, to, name, flags) in
                [(&a, &b, "b", "--verify"), (&b, &a, "a", "--mode post-copy")]
            {
                let report = from.json(&format!("migrate web {name} --json {flags}"));
                println!("{report}");
                is_sound(&report);
                assert_eq!(report["paused"], true, "{report}");
                assert_eq!(state(&to.vm("web")), "paused");
            }
            a.says("resume web");
            let guest = a.vm("web").guest().unwrap();
            goes_on(&guest);
            ends_load(&guest);
            drop(guest);
            a.says("rm --force web");
        },
    );
}

#[test]
fn a_paused_guest_whose_old_monitor_is_killed_at_the_last_moment_stays_paused() {
    natively(
        || native("paused-orphan").unwrap(),
        |host| {
            let vm = pv(host, "here");
            let guest = vm.guest().unwrap();
            begins_load(&guest, "/dev/xvda");
            goes_on(&guest);
            vm.blanket("pause", "").unwrap();
            drop(guest);
            // Either end may have it, or nobody, if that was before all of it was there.
            let kill = "blanket migrate here --as there --console socket=/run/blanket/there/console.sock & \
                        pid=$(blanket info here --json | sed -n 's/.*\"pid\": *\\([0-9]*\\).*/\\1/p' | head -n 1); \
                        for i in $(seq 2000); do blanket info there --json 2>/dev/null | \
                        grep -q paused && break; done; kill -9 $pid || true; wait $! || true";
            host.sh(kill).timeout(LONG).text().unwrap();
            let list = host.sh("blanket ps --json").text().unwrap();
            let list: Value = serde_json::from_str(&list).unwrap();
            println!("{list}");
            for vm in list.as_array().unwrap() {
                if vm["name"] == "there" {
                    assert_eq!(vm["state"], "paused", "{vm}");
                    host.sh("blanket resume there").text().unwrap();
                    let there = Vm::started(host, "there");
                    let guest = there.guest().unwrap();
                    goes_on(&guest);
                    ends_load(&guest);
                }
            }
            host.sh("blanket rm --force here; blanket rm --force there; true")
                .text()
                .unwrap();
        },
    );
}
