"""Room commands: one small module per command. In: parsed options. Out: an exit code, after one call and one print.

`options` holds the options that several commands share, `inputs` turns them into the dataclasses of the other rooms,
`output` prints tables or the one JSON document.
"""
