//! Which entries a frame would hit, and why: as `ofproto/trace`.

use std::fmt::{self, Display, Write};
use std::sync::Arc;

use super::fields::{Field, Flat};
use super::matches::Match;
use super::tables::Tables;
use super::walk::{Decision, Event, Step, Walk};
use crate::frame::Key;

/// What would happen to a frame.
#[derive(Clone, Debug)]
pub struct Trace {
    /// As text, a line for each thing that happens.
    pub lines: Vec<String>,
    /// What is decided in the end.
    pub decision: Arc<Decision>,
}

impl Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.lines {
            writeln!(f, "{line}")?;
        }
        Ok(())
    }
}

/// Follows a frame with this key through the tables, without counting it.
/// `state` is what is known of its connection ([`super::fields::ct_state`]),
/// where it has been looked up.
#[must_use]
pub fn trace(tables: &Tables, key: &Key, state: u8) -> Trace {
    let mut flat = Flat::of(key);
    flat.set(Field::CtState, state.into(), u128::MAX);
    let mut lines = vec![format!("Flow: {}", describe(&flat)), String::new()];
    lines.push("bridge".to_owned());
    lines.push("------".to_owned());
    let mut start = 0;
    let mut decision = Arc::<Decision>::default();
    // A connection's state is not known: it is traced as it was given.
    for _ in 0..4 {
        let mut watch = |event| lines.push(line(&event));
        decision = Walk::new(tables, flat).watched(&mut watch).decide(start);
        let Some(Step::Ct {
            table: Some((table, metadata)),
            ..
        }) = decision.steps.last()
        else {
            break;
        };
        start = *table;
        flat.set(Field::Metadata, (*metadata).into(), u128::MAX);
        lines.push(String::new());
        lines.push(format!("after ct(), as {}", describe(&flat)));
    }
    lines.push(String::new());
    lines.push(format!("Decision: {}", summary(&decision)));
    Trace { lines, decision }
}

/// A frame's key as a match on all that it has.
fn describe(flat: &Flat) -> String {
    let mut matches = Match::any();
    // Those that others need, first; what a frame does not have is refused.
    let first = [Field::EthType, Field::IpProto, Field::VlanTci];
    for field in first.into_iter().chain(Field::ALL) {
        let value = flat.get(field);
        let shown = value != 0 || field == Field::EthType;
        if shown && field != Field::InnerTci {
            let _ = matches.exactly(field, value);
        }
    }
    matches.to_string()
}

fn line(event: &Event) -> String {
    match event {
        Event::Table(id, None) => format!("{id:2}. No match: it is dropped."),
        Event::Table(id, Some(entry)) => {
            let flow = &entry.flow;
            let mut text = format!("{id:2}. ");
            // Writing to a string does not fail.
            let matches = flow.matches.to_string();
            let comma = if matches.is_empty() { "" } else { "," };
            let _ = write!(text, "{matches}{comma} priority {}", flow.priority);
            if flow.cookie != 0 {
                let _ = write!(text, ", cookie {:#x}", flow.cookie);
            }
            if flow.actions.is_empty() {
                text.push_str("\n    drop");
            }
            text
        }
        Event::Did(action) => format!("    {action}"),
        Event::Back(table) => format!("    back in table {table}"),
        Event::Finally => "    in the end:".to_owned(),
        Event::Stop(why) => format!("    {why}"),
    }
}

fn summary(decision: &Decision) -> String {
    let mut parts: Vec<String> = decision.steps.iter().map(step).collect();
    if let Some(reason) = decision.drop {
        parts.push(format!("drop ({reason})"));
    }
    parts.join(",")
}

fn step(step: &Step) -> String {
    use super::actions::Action;
    let action = match *step {
        Step::Output(port) => Action::Output(port),
        Step::InPort => Action::InPort,
        Step::Normal => Action::Normal,
        Step::Flood => Action::Flood,
        Step::All => Action::All,
        Step::Controller(what) => Action::Controller {
            max_len: what.max_len,
        },
        Step::Mirror(port) => Action::Mirror(port),
        Step::Set { field, value, mask } => Action::Set { field, value, mask },
        Step::DecTtl => Action::DecTtl,
        Step::PushVlan(tpid) => Action::PushVlan(tpid),
        Step::PopVlan => Action::PopVlan,
        Step::Meter(_) => return "meter".to_owned(),
        Step::Ct {
            commit,
            zone,
            table,
        } => Action::Ct {
            commit,
            zone,
            table: table.map(|(table, _)| table),
        },
    };
    action.to_string()
}
