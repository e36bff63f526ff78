//! Slurm's variables, which need more reading than the others': lists of machines in brackets, tasks per machine with
//! repeats, and the batch script, which has a task number without being a task.

use crate::env::{Launcher, Number, Vars, World, at_most, below, contradiction, master_addr};
use crate::{Error, Result};

/// The world of a task that `srun` started.
pub(crate) fn world(vars: &Vars) -> Result<World> {
    let rank = vars.required("SLURM_PROCID", "SLURM_NTASKS")?;
    let Some(size) = vars.first_number(&["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"])? else {
        // `sbatch` without --ntasks: its script is one process.
        return Ok(World { launcher: Launcher::Slurm, ..World::single() });
    };
    // The script itself gets SLURM_PROCID=0 and the job's number of tasks; only `srun` adds a step.
    if size.name != "SLURM_STEP_NUM_TASKS" && vars.is_set("SLURM_JOB_ID") && !vars.is_set("SLURM_STEP_ID") && size.value > 1 {
        return Err(contradiction(
            size.name,
            size.value,
            "this process was not started by srun, so the job's other tasks do not exist".into(),
            "start it with `srun`, use `lokr launch`, or unset SLURM_NTASKS to run as one process",
        ));
    }
    below(rank, size)?;
    let nodes = vars.first_number(&["SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES"])?;
    let node = vars.number("SLURM_NODEID")?;
    if let (Some(node), Some(nodes)) = (node, nodes) {
        below(node, nodes)?;
    }
    let local = vars.required("SLURM_LOCALID", "SLURM_PROCID")?;
    let local_size = tasks_here(vars, size, nodes, node)?;
    at_most(local_size, size)?;
    below(local, local_size)?;
    let run_id = match (vars.text("SLURM_JOB_ID"), vars.text("SLURM_STEP_ID")) {
        (Some(job), Some(step)) => format!("{job}.{step}"),
        (job, _) => job.unwrap_or_default(),
    };
    let (master_port, port_span) = vars.master_port(&run_id)?;
    let known = if local_size.value == size.value { Some("127.0.0.1".into()) } else { first_machine(vars)? };
    let master_addr = master_addr(vars, size, known, "set MASTER_ADDR to the machine of rank 0 before `srun`")?;
    Ok(World {
        rank: rank.value,
        local_rank: local.value,
        world_size: size.value,
        local_world_size: local_size.value,
        node_rank: node.map_or(rank.value / local_size.value, |node| node.value),
        master_addr,
        master_port,
        port_span,
        run_id,
        launcher: Launcher::Slurm,
    })
}

/// How many tasks this machine has.
fn tasks_here(vars: &Vars, size: Number, nodes: Option<Number>, node: Option<Number>) -> Result<Number> {
    if nodes.is_some_and(|nodes| nodes.value == 1) {
        return Ok(size);
    }
    for name in ["SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"] {
        let (Some(text), Some(node)) = (vars.text(name), node) else { continue };
        let counts = tasks_per_node(&text).ok_or_else(|| unreadable(name, &text, "a list as `4(x2),3` is needed"))?;
        return match counts.get(node.value) {
            Some(&value) => Ok(Number { name, value }),
            None => Err(Error::Variable {
                name,
                value: Some(text),
                what: format!("it has no entry for {}, which is {}", node.name, node.value),
                way_out: "start the processes with one `srun`".into(),
            }),
        };
    }
    if let Some(tasks) = vars.number("SLURM_NTASKS_PER_NODE")? {
        return Ok(tasks);
    }
    // Without a word about machines there is one.
    Ok(nodes.map_or(size, |nodes| Number { name: size.name, value: size.value.div_ceil(nodes.value.max(1)) }))
}

/// The machine of the step's first task. The machine on which `srun` was typed comes last: it is often a login node.
fn first_machine(vars: &Vars) -> Result<Option<String>> {
    for name in ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"] {
        if let Some(list) = vars.text(name) {
            return match first_of_list(&list) {
                Some(first) => Ok(Some(first)),
                None => Err(unreadable(name, &list, "a list of machines as `gpu[01-04],login` is needed")),
            };
        }
    }
    Ok(vars.text("SLURM_LAUNCH_NODE_IPADDR"))
}

fn unreadable(name: &'static str, value: &str, what: &str) -> Error {
    Error::Variable {
        name,
        value: Some(value.into()),
        what: what.into(),
        way_out: "set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT yourself".into(),
    }
}

/// `gpu[003-010,12],x1` gives `gpu003`.
fn first_of_list(list: &str) -> Option<String> {
    let mut name = String::new();
    let mut rest = list;
    loop {
        let end = rest.find([',', '[']).unwrap_or(rest.len());
        name.push_str(&rest[..end]);
        if !rest[end..].starts_with('[') {
            return (!name.is_empty() && !name.contains(']')).then_some(name);
        }
        let (inside, after) = rest[end + 1..].split_once(']')?;
        let first = &inside[..inside.find([',', '-']).unwrap_or(inside.len())];
        if first.is_empty() {
            return None;
        }
        name.push_str(first);
        rest = after;
    }
}

/// `2(x3),1` gives 2, 2, 2, 1.
fn tasks_per_node(text: &str) -> Option<Vec<usize>> {
    let mut counts = Vec::new();
    for entry in text.split(',') {
        let (count, times) = match entry.split_once("(x") {
            Some((count, times)) => (count, times.strip_suffix(')')?.parse().ok()?),
            None => (entry, 1),
        };
        // No machine list is longer than this; a larger repeat is not a list but an accident.
        if times > 1 << 20 {
            return None;
        }
        counts.extend(std::iter::repeat_n(count.trim().parse::<usize>().ok()?, times));
    }
    Some(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_machine_of_a_list() {
        for (list, first) in [
            ("gpu7", Some("gpu7")),
            ("gpu[003-010,12],x1", Some("gpu003")),
            ("a[5,7-9]", Some("a5")),
            ("r[1-2]n[04-05]-ib,z", Some("r1n04-ib")),
            ("login,gpu[1-2]", Some("login")),
            ("gpu[1-2", None),
            ("gpu[]", None),
            ("gpu1]", None),
            ("", None),
        ] {
            assert_eq!(first_of_list(list).as_deref(), first, "{list}");
        }
    }

    #[test]
    fn repeats_in_tasks_per_node() {
        assert_eq!(tasks_per_node("2(x3),1"), Some(vec![2, 2, 2, 1]));
        assert_eq!(tasks_per_node("4"), Some(vec![4]));
        for bad in ["", "4(x", "x2", "4(x2", "4(x99999999999)"] {
            assert_eq!(tasks_per_node(bad), None, "{bad}");
        }
    }
}
