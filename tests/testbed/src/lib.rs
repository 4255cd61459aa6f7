//! The cloud testbed.
