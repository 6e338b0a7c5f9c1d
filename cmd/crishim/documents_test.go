package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cpuguy83/go-md2man/v2/md2man"
	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// Man pages and completions are made here, not by the binary, which so has nothing in it that a node has no use for: make man.
var documentsDir = flag.String("documents", "", "directory to write man pages and completions to")

// TestDocuments makes them, and sees that nothing lacks its page. Their one source are the commands, and for crishim-config(5) the configuration
// file that is shipped.
func TestDocuments(t *testing.T) {
	dir := *documentsDir
	if dir == "" {
		dir = t.TempDir()
	}
	date := time.Unix(0, 0)
	if epoch, err := strconv.ParseInt(os.Getenv("SOURCE_DATE_EPOCH"), 10, 64); err == nil {
		date = time.Unix(epoch, 0)
	}
	date = date.UTC()
	source := "crishim " + version
	for _, sub := range []string{"man", "completions"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}

	root := rootCommand()
	pages := map[string]string{} // what each has to say
	each(root, func(c *cobra.Command) {
		pages[strings.ReplaceAll(c.CommandPath(), " ", "-")+".8"] = c.Short
		c.DisableAutoGenTag = true
		c.Long = layout(c.Long)
	})
	err := doc.GenManTreeFromOpts(root, doc.GenManTreeOptions{
		Header: &doc.GenManHeader{Section: "8", Date: &date, Source: source, Manual: "crishim"},
		Path:   filepath.Join(dir, "man"), CommandSeparator: "-",
	})
	if err != nil {
		t.Fatal(err)
	}
	config, err := os.ReadFile("../../systemd/config.toml")
	if err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf("%% \"CRISHIM-CONFIG\" \"5\" \"%s\" \"%s\" \"crishim\"\n%s", date.Format("Jan 2006"), source, configPage(string(config)))
	if err := os.WriteFile(filepath.Join(dir, "man/crishim-config.5"), md2man.Render([]byte(text)), 0o644); err != nil {
		t.Fatal(err)
	}
	pages["crishim-config.5"] = "max_frozen"
	for page, want := range pages {
		content, err := os.ReadFile(filepath.Join(dir, "man", page))
		plain := strings.NewReplacer(`\-`, "-", `\&`, "", `\_`, "_").Replace(string(content))
		if err != nil || !strings.Contains(plain, want) {
			t.Errorf("%s, %v, does not say %q:\n%s", page, err, want, plain)
		}
	}

	err = errors.Join(
		root.GenBashCompletionFileV2(filepath.Join(dir, "completions/crishim.bash"), true),
		root.GenZshCompletionFile(filepath.Join(dir, "completions/_crishim")),
		root.GenFishCompletionFile(filepath.Join(dir, "completions/crishim.fish"), true),
	)
	if err != nil {
		t.Fatal(err)
	}
}

func each(c *cobra.Command, do func(*cobra.Command)) {
	do(c)
	for _, sub := range c.Commands() {
		each(sub, do)
	}
}

// layout keeps the lines of paragraphs that are laid out in columns as they are.
func layout(text string) string {
	paragraphs := strings.Split(text, "\n\n")
	for i, p := range paragraphs {
		if strings.Contains("\n"+p, "\n ") {
			paragraphs[i] = "    " + strings.ReplaceAll(p, "\n", "\n    ")
		}
	}
	return strings.Join(paragraphs, "\n\n")
}

// configPage describes each key of a configuration file by the comment above it, in Markdown.
func configPage(file string) string {
	var b bytes.Buffer
	plain := strings.NewReplacer("*", `\*`, "_", `\_`, "<", `\<`)
	b.WriteString("# NAME\ncrishim-config \\- configuration of the crishim daemon\n\n# SYNOPSIS\n/etc/crishim/config.toml\n\n# DESCRIPTION\n")
	var comment []string
	table, keys := "", false
	for line := range strings.Lines(file) {
		line = strings.TrimSpace(line)
		name, value, isKey := strings.Cut(line, " = ")
		switch text, isComment := strings.CutPrefix(line, "# "); {
		case isComment:
			comment = append(comment, plain.Replace(text))
		case strings.HasPrefix(line, "["):
			table = strings.Trim(line, "[]") + "."
			fmt.Fprintf(&b, "# KEYS OF THE TABLE %s\n", line)
			comment = nil
		case isKey:
			if !keys && table == "" {
				b.WriteString("# KEYS\n")
			}
			keys = true
			fmt.Fprintf(&b, "**%s** = %s\n", plain.Replace(table+name), plain.Replace(value))
			if comment != nil {
				fmt.Fprintf(&b, "\n> %s\n", strings.Join(comment, "\n> "))
			}
			b.WriteByte('\n')
			comment = nil
		case line == "" && comment != nil: // what is above all keys
			b.WriteString(strings.Join(comment, "\n") + "\n\n")
			comment = nil
		}
	}
	b.WriteString("# SEE ALSO\n**crishim(8)**, **crishim-serve(8)**\n")
	return b.String()
}
