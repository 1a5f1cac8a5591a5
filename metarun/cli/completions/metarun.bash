# Completion of metarun in bash.
#   eval "$(metarun completion bash)"     in this shell; in ~/.bashrc for all

_metarun() {
    local candidate program=${1/#\~/$HOME}
    COMPREPLY=()
    while IFS= read -r candidate; do
        COMPREPLY+=("$candidate")
    done < <("$program" completion candidates bash "${COMP_LINE:0:COMP_POINT}" "$2" 2>/dev/null)
}

complete -o nospace -F _metarun metarun
