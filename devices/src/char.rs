//! Character devices: where a serial port or a console leads.
