"""What every op is built on, on any device: data types, arrays, devices, recordings, the declaration of an op. Nothing is compiled here."""
