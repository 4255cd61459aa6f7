//! The providers: a file and a line in [`KNOWN`] for each.

mod azure;
mod bare_metal;
mod digitalocean;
mod ec2;
mod gce;
mod hetzner;
mod openstack;
mod vmware;
mod xen;

use super::identify::Provider;

/// Clouds first, those whose metadata services look like another's before that
/// one.
pub(super) const KNOWN: &[&Provider] = &[
    &gce::PROVIDER,
    &azure::PROVIDER,
    &digitalocean::PROVIDER,
    &hetzner::PROVIDER,
    &openstack::PROVIDER,
    &ec2::PROVIDER,
    &vmware::PROVIDER,
    &xen::PROVIDER,
    &bare_metal::PROVIDER,
];

#[cfg(test)]
mod tests;
