//! Others' encrypted overlays, in a process each, between the same tenants.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::progress::Progress;
use crate::run::{Output, checked};
use crate::workspace::Workspace;

/// What is installed, and its program.
const CRATES: [(&str, &str); 2] = [
    ("boringtun-cli@0.7.1", "boringtun-cli"),
    ("vpncloud@2.3.0", "vpncloud"),
];

/// Both between the tenants: boringtun (`10.4.0.x`) and vpncloud (`10.5.0.x`).
pub(super) const NETWORKS: &str = r#"set -e
umask 077
for i in 1 2; do
  wg genkey > /run/wg$i.key
  wg pubkey < /run/wg$i.key > /run/wg$i.pub
  # vpncloud asks which way it would go to somebody far away.
  ip -n n$i route add default dev u$i
  WG_SUDO=1 ip netns exec n$i boringtun-cli --foreground --disable-drop-privileges w$i \
    >/run/boringtun$i.log 2>&1 &
  echo $! >> /run/others
  ip netns exec n$i vpncloud -t tap -d v$i -m switch --no-port-forwarding \
    -l 192.0.2.$i:3210 -c 192.0.2.$((3 - i)):3210 -p secret >/run/vpncloud$i.log 2>&1 &
  echo $! >> /run/others
done
for i in 1 2; do
  o=$((3 - i))
  timeout 10 sh -c "until ip -n n$i link show w$i && ip -n n$i link show v$i; do sleep 0.1; done" >/dev/null 2>&1
  ip netns exec n$i wg set w$i listen-port 51820 private-key /run/wg$i.key \
    peer $(cat /run/wg$o.pub) endpoint 192.0.2.$o:51820 allowed-ips 10.4.0.0/24
  ip -n n$i link set dev w$i netns t$i
  ip -n t$i addr add 10.4.0.$i/24 dev w$i
  ip -n t$i link set dev w$i mtu 1420 up
  ip -n n$i link set dev v$i netns t$i
  ip -n t$i addr add 10.5.0.$i/24 dev v$i
  ip -n t$i link set dev v$i mtu 1400 up
done
for n in 4 5; do
  timeout 20 sh -c "until ip netns exec t1 ping -c 1 -W 1 10.$n.0.2; do sleep 0.2; done" >/dev/null
done
"#;

/// Installs them, which takes minutes the first time, beside what is built.
///
/// # Errors
/// One cannot be built.
pub(super) fn install(
    workspace: &Workspace,
    progress: &Progress,
) -> Result<Vec<(PathBuf, &'static str)>> {
    let root = workspace.target().join("bench/peers");
    let mut programs = Vec::new();
    for (package, name) in CRATES {
        let program = root.join("bin").join(name);
        if !program.exists() {
            let step = progress.step(&format!("cargo install {package}"));
            let mut command = Command::new("cargo");
            command.args(["install", "--locked", package, "--root"]);
            command.arg(&root);
            checked(&step, &mut command, Output::IfItFails)?;
            step.done("");
        }
        programs.push((program, name));
    }
    Ok(programs)
}
