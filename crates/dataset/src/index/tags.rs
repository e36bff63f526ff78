//! Tags in memory, and lists of tags as bytes: each tag's number in LEB128 (seven bits a byte, the lowest first, the
//! high bit set on all but the last). Numbers are given by frequency, so most take one byte or two.

use std::collections::HashMap;

use rusqlite::{Connection, params};

use super::TagClass;

/// All tags of an index. About 20 bytes a tag and its name.
#[derive(Debug, Default)]
pub struct TagTable {
    names: String,
    /// Place of each number's name; where two neighbours are equal, the number is not in use.
    ends: Vec<u32>,
    classes: Vec<u8>,
}

impl TagTable {
    pub(super) fn load(connection: &Connection) -> rusqlite::Result<Self> {
        let mut table = Self { names: String::new(), ends: vec![0], classes: vec![0] };
        let mut statement = connection.prepare("SELECT id, name, class FROM tag ORDER BY id")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let id = row.get::<_, u32>(0)? as usize;
            table.ends.resize(id, table.names.len() as u32);
            table.classes.resize(id, 0);
            table.names.push_str(row.get_ref(1)?.as_str()?);
            table.ends.push(table.names.len() as u32);
            table.classes.push(row.get(2)?);
        }
        Ok(table)
    }

    /// A tag's name, with its underscores, and class; `None` for a number that is not in use.
    pub fn get(&self, id: u32) -> Option<(&str, TagClass)> {
        let i = id as usize;
        let (start, end) = (*self.ends.get(i.checked_sub(1)?)?, *self.ends.get(i)?);
        let name = self.names.get(start as usize..end as usize).filter(|name| !name.is_empty())?;
        Some((name, TagClass::from_number(i64::from(*self.classes.get(i)?))?))
    }

    /// The number of the tag with this name.
    pub fn find(&self, name: &str) -> Option<u32> {
        (1..=self.last()).find(|&id| self.get(id).is_some_and(|(n, _)| n == name))
    }

    /// The highest number that a tag may have.
    pub fn last(&self) -> u32 {
        (self.ends.len() as u32).saturating_sub(1)
    }

    /// Number of tags.
    pub fn len(&self) -> usize {
        self.ends.windows(2).filter(|w| w[0] != w[1]).count()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }
}

/// Appends a tag's number to a list.
pub(super) fn push(list: &mut Vec<u8>, mut id: u32) {
    while id >= 0x80 {
        list.push(id as u8 | 0x80);
        id >>= 7;
    }
    list.push(id as u8);
}

/// The numbers of a list; a torn last one is left out.
pub(crate) fn numbers(list: &[u8]) -> impl Iterator<Item = u32> + '_ {
    let mut bytes = list.iter();
    std::iter::from_fn(move || {
        let mut id = 0u32;
        for shift in (0..35).step_by(7) {
            let byte = *bytes.next()?;
            id |= u32::from(byte & 0x7F).checked_shl(shift).unwrap_or(0);
            if byte < 0x80 {
                break;
            }
        }
        Some(id)
    })
}

/// Gives numbers to names while an index is built.
#[derive(Debug)]
pub(super) struct Interner {
    known: HashMap<String, u32>,
    next: u32,
}

impl Interner {
    pub fn load(connection: &Connection) -> rusqlite::Result<Self> {
        let mut known = HashMap::new();
        let mut statement = connection.prepare("SELECT name, id FROM tag")?;
        let mut rows = statement.query([])?;
        let mut next = 1;
        while let Some(row) = rows.next()? {
            let id: u32 = row.get(1)?;
            next = next.max(id + 1);
            known.insert(row.get(0)?, id);
        }
        Ok(Self { known, next })
    }

    /// The number of a tag, and whether it was known; a new one is written into the index.
    pub fn number(&mut self, connection: &Connection, name: &str, class: TagClass, posts: i64) -> rusqlite::Result<(u32, bool)> {
        if let Some(&id) = self.known.get(name) {
            return Ok((id, true));
        }
        let id = self.next;
        self.next += 1;
        let mut insert = connection.prepare_cached("INSERT INTO tag VALUES (?, ?, ?, ?)")?;
        insert.execute(params![id, name, class as i64, posts])?;
        self.known.insert(name.into(), id);
        Ok((id, false))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_come_back() {
        let ids = [1, 127, 128, 300, 16_383, 16_384, 2_000_000, u32::MAX];
        let mut list = Vec::new();
        ids.iter().for_each(|&id| push(&mut list, id));
        assert_eq!(numbers(&list).collect::<Vec<_>>(), ids);
        assert_eq!(list[..3], [1, 127, 0x80]);
        // A list cut anywhere ends early and does nothing worse.
        for cut in 0..list.len() {
            assert!(ids.starts_with(&numbers(&list[..cut]).collect::<Vec<_>>()));
        }
    }
}
