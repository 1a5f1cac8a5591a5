# Completion of metarun in fish.
#   metarun completion fish | source      in this shell; in ~/.config/fish/config.fish for all

function __metarun_candidates
    set -l words (commandline --current-process --tokenize --cut-at-cursor)
    set -l program (string replace --regex '^~' $HOME -- $words[1])
    $program completion candidates fish (commandline --current-process --cut-at-cursor) 2>/dev/null
end

complete --command metarun --no-files --arguments '(__metarun_candidates)'
