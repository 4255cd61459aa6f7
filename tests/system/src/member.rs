//! Nodes of a cluster, all on this machine.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use anyhow::Result;
use blanket_testbed::{Client, Host, HostBuilder, Output};

use crate::{GUEST_LIMIT, Vm, native, program};

/// A network namespace `nN` with a `blanketd` and a home of its own.
pub struct Member<'a> {
    host: &'a Client,
    number: u8,
    home: String,
}

impl<'a> Member<'a> {
    /// The first namespaces, on one bridge.
    pub const NETWORK: &'static str = "ip link add br0 type bridge && ip link set br0 up && \
        for n in 1 2 3; do \
        ip netns add n$n && ip link add v$n type veth peer name eth0 netns n$n && \
        ip link set v$n master br0 up && \
        ip -n n$n addr add 10.7.0.$n/24 dev eth0 && \
        ip -n n$n link set eth0 up && ip -n n$n link set lo up || exit 1; done";

    /// In namespace `number`, in `/run/HOME`.
    #[must_use]
    pub fn new(host: &'a Client, number: u8, home: &str) -> Self {
        Self {
            host,
            number,
            home: format!("/run/{home}"),
        }
    }

    /// This machine with what its nodes need.
    ///
    /// # Errors
    /// Not run by `cargo xtask test`, or an image cannot be built.
    pub fn nodes(name: &str) -> Result<HostBuilder> {
        Ok(native(name)?.inject(program("blanketd")?, "/usr/bin/blanketd"))
    }

    /// Two nodes of one cluster, `a` and `b`, in `/run/h1` and `/run/h2`, on whose network their
    /// guests are, too.
    #[must_use]
    pub fn two(host: &'a Host) -> [Self; 2] {
        host.sh(Member::NETWORK).text().unwrap();
        let nodes = [(1, "h1"), (2, "h2")].map(|(n, home)| Member::new(host, n, home));
        for (n, node) in (1..).zip(&nodes) {
            let bridge = format!(
                "ip -n n{n} link add guests type bridge && ip -n n{n} link set guests up && \
                 ip -n n{n} link set eth0 master guests && ip -n n{n} addr flush dev eth0 && \
                 ip -n n{n} addr add 10.7.0.{n}/24 dev guests"
            );
            host.sh(bridge).text().unwrap();
            node.start();
        }
        host.sh("ip addr add 10.7.0.100/24 dev br0").text().unwrap();
        let [a, b] = &nodes;
        a.says("ca init --name a");
        b.says(&format!("{} --name b", a.lets_join()));
        nodes
    }

    /// Starts its daemon.
    pub fn start(&self) {
        self.start_with("");
    }

    /// The same with these options.
    pub fn start_with(&self, flags: &str) {
        let (n, home) = (self.number, &self.home);
        let run =
            format!("echo $$ > {home}.pid; exec ip netns exec n{n} blanketd --home {home} {flags}");
        self.host.sh(run).spawn(format!("{home}.log")).unwrap();
        let ready = format!("until [ -S {home}/blanketd.sock ]; do sleep 0.1; done");
        self.host.sh(ready).timeout(GUEST_LIMIT).text().unwrap();
    }

    /// Ends its daemon without asking.
    pub fn kill(&self) {
        let home = &self.home;
        let kill = format!(
            "kill -9 $(cat {home}.pid); while [ -e /proc/$(cat {home}.pid) ]; do \
             sleep 0.1; done; rm -f {home}/blanketd.sock"
        );
        self.host.sh(kill).text().unwrap();
    }

    /// Where it keeps what it has.
    #[must_use]
    pub fn home(&self) -> &str {
        &self.home
    }

    /// How `blanket` is called there.
    #[must_use]
    pub fn command(&self) -> String {
        let (n, home) = (self.number, &self.home);
        format!("ip netns exec n{n} blanket --home {home}")
    }

    /// A VM of it.
    #[must_use]
    pub fn vm(&self, name: &str) -> Vm<'a> {
        Vm::started_in(self.host, &self.home, self.command(), name)
    }

    /// `blanket COMMAND`.
    #[must_use]
    pub fn run(&self, command: &str) -> Output {
        let line = format!("{} {command}", self.command());
        self.host.sh(line).timeout(GUEST_LIMIT).run().unwrap()
    }

    /// The same with success: what it says.
    pub fn says(&self, command: &str) -> String {
        let output = self.run(command);
        assert!(output.status.success(), "{command}: {output}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// The same without: the error.
    pub fn refuses(&self, command: &str) -> String {
        let output = self.run(command);
        assert!(!output.status.success(), "{command}: {output}");
        String::from_utf8(output.stderr).unwrap()
    }

    /// What it says, read.
    #[must_use]
    pub fn json(&self, command: &str) -> serde_json::Value {
        serde_json::from_str(&self.says(command)).unwrap()
    }

    /// The words that let another node join.
    #[must_use]
    pub fn lets_join(&self) -> String {
        let line = self.says("node token");
        line.trim().strip_prefix("blanket ").unwrap().to_owned()
    }
}
