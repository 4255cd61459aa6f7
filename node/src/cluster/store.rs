//! What a node remembers: values by key, on its own disk.

use std::path::Path;

use anyhow::{Context, Result};
use redb::{Database, TableDefinition, TableError};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::failure::failure;

const TABLE: TableDefinition<&str, &[u8]> = TableDefinition::new("blanket");

/// Where values are kept. What a call has done stays done, also when the
/// machine ends in the next moment.
pub(crate) trait Store: Send + Sync {
    /// The value of `key`, if there is one.
    ///
    /// # Errors
    /// The store cannot be read.
    fn get(&self, key: &str) -> Result<Option<Vec<u8>>>;

    /// Gives `key` a value.
    ///
    /// # Errors
    /// The store cannot be written; `key` has its former value.
    fn put(&self, key: &str, value: &[u8]) -> Result<()>;

    /// Removes `key`. Of several that do so at once, one is told that it was
    /// there.
    ///
    /// # Errors
    /// The store cannot be written; `key` is still there.
    fn remove(&self, key: &str) -> Result<bool>;

    /// The keys that begin with `prefix`, in order.
    ///
    /// # Errors
    /// The store cannot be read.
    fn keys(&self, prefix: &str) -> Result<Vec<String>>;
}

/// Reads a value of a type of its own.
pub(crate) fn read<T: DeserializeOwned>(store: &dyn Store, key: &str) -> Result<Option<T>> {
    let value = store.get(key)?;
    value
        .map(|bytes| serde_json::from_slice(&bytes))
        .transpose()
        .with_context(|| format!("the store's value of {key} is damaged"))
}

/// Writes a value of a type of its own.
pub(crate) fn write<T: Serialize>(store: &dyn Store, key: &str, value: &T) -> Result<()> {
    store.put(key, &serde_json::to_vec(value)?)
}

/// A store in one file.
pub(crate) struct Redb(Database);

impl Redb {
    /// Opens the file, or makes it. Only one process can have it open.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        match Database::create(path) {
            Ok(database) => Ok(Self(database)),
            Err(redb::DatabaseError::DatabaseAlreadyOpen) => Err(failure(
                "another blanketd runs with this home",
                "end it first, or use it",
            )),
            Err(error) => {
                Err(error).with_context(|| format!("cannot open the store {}", path.display()))
            }
        }
    }

    fn reading<T>(
        &self,
        read: impl FnOnce(&redb::ReadOnlyTable<&'static str, &'static [u8]>) -> Result<T>,
    ) -> Result<Option<T>> {
        match self.0.begin_read()?.open_table(TABLE) {
            Ok(table) => read(&table).map(Some),
            // Nothing has been written yet.
            Err(TableError::TableDoesNotExist(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn writing<T>(
        &self,
        write: impl FnOnce(&mut redb::Table<'_, &'static str, &'static [u8]>) -> Result<T>,
    ) -> Result<T> {
        let transaction = self.0.begin_write()?;
        let done = write(&mut transaction.open_table(TABLE)?)?;
        transaction.commit()?;
        Ok(done)
    }
}

impl Store for Redb {
    fn get(&self, key: &str) -> Result<Option<Vec<u8>>> {
        let value =
            self.reading(|table| Ok(table.get(key)?.map(|value| value.value().to_vec())))?;
        Ok(value.flatten())
    }

    fn put(&self, key: &str, value: &[u8]) -> Result<()> {
        self.writing(|table| Ok(table.insert(key, value).map(drop)?))
    }

    fn remove(&self, key: &str) -> Result<bool> {
        self.writing(|table| Ok(table.remove(key)?.is_some()))
    }

    fn keys(&self, prefix: &str) -> Result<Vec<String>> {
        let keys = self.reading(|table| {
            let mut keys = Vec::new();
            for entry in table.range(prefix..)? {
                let key = entry?.0.value().to_owned();
                if !key.starts_with(prefix) {
                    break;
                }
                keys.push(key);
            }
            Ok(keys)
        })?;
        Ok(keys.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_outlive_the_process_and_a_key_is_removed_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let store = Redb::open(&path).unwrap();
        assert_eq!(store.get("a").unwrap(), None);
        assert!(store.keys("").unwrap().is_empty());
        write(&store, "token/1", &1u32).unwrap();
        write(&store, "token/2", &2u32).unwrap();
        write(&store, "other", &3u32).unwrap();
        let error = Redb::open(&path).err().unwrap();
        assert!(error.to_string().contains("another blanketd"), "{error}");
        drop(store);
        let store = Redb::open(&path).unwrap();
        assert_eq!(read::<u32>(&store, "token/2").unwrap(), Some(2));
        assert_eq!(store.keys("token/").unwrap(), ["token/1", "token/2"]);
        assert!(store.remove("token/1").unwrap());
        assert!(!store.remove("token/1").unwrap());
        store.put("other", b"{").unwrap();
        assert!(read::<u32>(&store, "other").is_err());
    }
}
