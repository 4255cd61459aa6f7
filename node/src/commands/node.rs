//! `blanket node`.

use std::process::ExitCode;

use anyhow::Result;
use hyper::Method;

use super::{print, print_json};
use crate::cluster::names::{Address, NodeName};
use crate::daemon::local::{self, Join, Joined, NewToken, NodeLine, TokenLife};
use crate::failure::{describe, failure};
use crate::home::Home;
use crate::table;

#[derive(clap::Subcommand)]
pub(crate) enum Args {
    /// List the nodes of the cluster.
    Ls(LsArgs),
    /// Make a token with which one other node can join (on the node with the CA).
    Token(TokenArgs),
    /// Join a cluster.
    Join(JoinArgs),
    /// Remove nodes: their certificates are no good from now on (on the node with the CA).
    Rm(RmArgs),
    /// Take this node out of its cluster.
    Leave,
}

#[derive(clap::Args)]
pub(crate) struct LsArgs {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
pub(crate) struct TokenArgs {
    /// Minutes for which it is good, at most a day.
    #[arg(long, value_name = "MINUTES", default_value_t = 15)]
    minutes: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
pub(crate) struct JoinArgs {
    /// Where the CA's node is, if not where the token says; and the token, or `-` to read it from
    /// standard input.
    #[arg(required = true, num_args = 1..=2, value_names = ["ADDRESS", "TOKEN"])]
    words: Vec<String>,
    /// This node's name [default: the machine's].
    #[arg(long)]
    name: Option<NodeName>,
    /// Where other nodes reach this one [default: where it comes from when it joins].
    #[arg(long, value_name = "HOST[:PORT]")]
    address: Option<Address>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
pub(crate) struct RmArgs {
    /// Nodes.
    #[arg(required = true, value_name = "NAME")]
    names: Vec<NodeName>,
}

pub(crate) fn node(home: &Home, args: &Args) -> Result<ExitCode> {
    match args {
        Args::Ls(args) => ls(home, args),
        Args::Token(args) => token(home, args),
        Args::Join(args) => join(home, args),
        Args::Rm(args) => return Ok(rm(home, args)),
        Args::Leave => local::ask(home, Method::POST, "/cluster/leave", None::<&()>),
    }?;
    Ok(ExitCode::SUCCESS)
}

fn ls(home: &Home, args: &LsArgs) -> Result<()> {
    let nodes: Vec<NodeLine> = local::ask(home, Method::GET, "/cluster/nodes", None::<&()>)?;
    if args.json {
        return print_json(&nodes);
    }
    print(&render(&nodes))?;
    for node in &nodes {
        if let Some(reason) = &node.reason {
            eprintln!("{}: {reason}", node.name);
        }
    }
    Ok(())
}

fn render(nodes: &[NodeLine]) -> String {
    let head = [
        "NAME", "ADDRESS", "VERSION", "STATE", "VMS", "MEMORY", "FREE", "PROVIDER",
    ];
    let mut rows = vec![head.map(String::from).to_vec()];
    rows.extend(nodes.iter().map(|node| {
        let mark = match (node.own, node.ca) {
            (true, true) => " (this one, CA)",
            (true, false) => " (this one)",
            (false, true) => " (CA)",
            (false, false) => "",
        };
        let told = |text: &dyn Fn(&crate::daemon::Report) -> String| {
            node.report.as_ref().map_or_else(|| "-".to_owned(), text)
        };
        vec![
            format!("{}{mark}", node.name),
            node.address.to_string(),
            told(&|it| it.version.clone()),
            node.state.clone(),
            told(&|it| it.vms.to_string()),
            told(&|it| table::bytes(it.memory_bytes)),
            told(&|it| table::bytes(it.memory_free_bytes)),
            told(&|it| it.provider.clone()),
        ]
    }));
    table::render(&rows)
}

fn token(home: &Home, args: &TokenArgs) -> Result<()> {
    let minutes = args.minutes;
    let life = TokenLife { minutes };
    let token: NewToken = local::ask(home, Method::POST, "/cluster/tokens", Some(&life))?;
    if args.json {
        return print_json(&token);
    }
    if std::io::IsTerminal::is_terminal(&std::io::stdout()) {
        eprintln!("On the other node, within {minutes} minutes:");
    }
    print(&format!(
        "blanket node join {} {}\n",
        token.address, token.token
    ))
}

fn join(home: &Home, args: &JoinArgs) -> Result<()> {
    let (at, token) = match args.words.as_slice() {
        [token] => (None, token),
        [at, token] => (Some(at.parse::<Address>()?), token),
        _ => return Err(failure("there is no token", "blanket node join --help")),
    };
    let mut token = token.clone();
    if token == "-" {
        token.clear();
        std::io::stdin().read_line(&mut token)?;
    }
    let request = Join {
        token: token.trim().to_owned(),
        at,
        name: args.name.clone(),
        address: args.address.clone(),
    };
    let joined: Joined = local::ask(home, Method::POST, "/cluster/join", Some(&request))?;
    if args.json {
        return print_json(&joined);
    }
    print(&format!(
        "node {} at {} is in a cluster of {}\n",
        joined.name, joined.address, joined.nodes
    ))
}

fn rm(home: &Home, args: &RmArgs) -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for name in &args.names {
        let path = format!("/cluster/nodes/{name}");
        let removed: Result<()> = local::ask(home, Method::DELETE, &path, None::<&()>);
        if let Err(error) = removed {
            eprintln!("{}", describe(&error));
            code = ExitCode::FAILURE;
        }
    }
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unreachable_node_is_a_line_without_figures() {
        let gone = NodeLine {
            name: "b".parse().unwrap(),
            address: "10.0.0.2".parse().unwrap(),
            state: "unreachable".to_owned(),
            own: false,
            ca: true,
            report: None,
            reason: Some("no answer".to_owned()),
        };
        let text = render(&[gone]);
        let words: Vec<_> = text.lines().nth(1).unwrap().split_whitespace().collect();
        let line = "b (CA) 10.0.0.2:7117 - unreachable - - - -";
        assert_eq!(words.join(" "), line);
    }
}
