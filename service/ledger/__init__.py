"""The database: what is asked, what happens, what was made; and the only writers of state.

    submit_job ─▶ resolve ─▶ fetch ─▶ plan ─▶ convert ─▶ quantize ─▶ bundle ─▶ verify ─▶ publish

`jobs` is what users do, `claims` and `results` what workers do, `views` what readers see; `moves` alone changes states.
"""
