//! Nodes of a cluster, all on this machine.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use blanket_testbed::{Client, Output};

use crate::{GUEST_LIMIT, Vm};

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

    /// Starts its daemon.
    pub fn start(&self) {
        let (n, home) = (self.number, &self.home);
        let run = format!("echo $$ > {home}.pid; exec ip netns exec n{n} blanketd --home {home}");
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
