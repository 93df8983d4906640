"""The decoder in C++: its sources, how they are compiled, and the functions of the library. Imports no torch."""
