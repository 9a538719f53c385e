"""What every op stands on, whatever runs it: data types, arrays, devices, recordings, the declaration of an op. Nothing here compiles."""
