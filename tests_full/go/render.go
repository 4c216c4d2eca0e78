// Renders conversations with Go's own text/template, on the data and with the functions that Ollama gives a template.
//
// It reads {"template": …, "conversations": [[{"role": …, "content": …}, …], …]} and writes a list of {"text": …} or
// {"error": …}. What is Ollama's here: an option for missing keys, the functions it adds, messages of one role in a row joined
// by a blank line, all system texts as .System, and the choice of this way for templates that name .Messages alone.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"text/template"
	"text/template/parse"
	"time"
)

type message struct {
	Role       string `json:"role"`
	Content    string `json:"content"`
	Thinking   string `json:"thinking"`
	Images     []string
	ToolCalls  []string
	ToolName   string
	ToolCallID string
}

type request struct {
	Template      string      `json:"template"`
	Conversations [][]message `json:"conversations"`
}

type result struct {
	Text  string `json:"text"`
	Error string `json:"error,omitempty"`
}

func date(days int) func(...string) string {
	return func(...string) string { return time.Now().AddDate(0, 0, days).Format("2006-01-02") }
}

var functions = template.FuncMap{
	"json": func(value any) string {
		written, _ := json.Marshal(value)
		return string(written)
	},
	"currentDate":      date(0),
	"yesterdayDate":    date(-1),
	"toTypeScriptType": func(any) string { return "any" },
}

// joined gives the system texts, and the messages with those of one role in a row as one; results of tools stay apart.
func joined(messages []message) (string, []*message) {
	var system []string
	var together []*message
	for _, each := range messages {
		each := each
		if each.Role == "system" {
			system = append(system, each.Content)
		}
		if last := len(together) - 1; last >= 0 && together[last].Role == each.Role && each.Role != "tool" {
			together[last].Content += "\n\n" + each.Content
		} else {
			together = append(together, &each)
		}
	}
	return strings.Join(system, "\n\n"), together
}

// names gives the fields and variables that a node reads. Like Ollama, it expects every template to be given data.
func names(node parse.Node) []string {
	var found []string
	switch node := node.(type) {
	case *parse.ListNode:
		if node != nil {
			for _, each := range node.Nodes {
				found = append(found, names(each)...)
			}
		}
	case *parse.ActionNode:
		return names(node.Pipe)
	case *parse.TemplateNode:
		if node.Pipe == nil {
			panic("a template without data: " + node.Name)
		}
		return names(node.Pipe)
	case *parse.IfNode:
		return append(append(names(node.Pipe), names(node.List)...), names(node.ElseList)...)
	case *parse.RangeNode:
		return append(append(names(node.Pipe), names(node.List)...), names(node.ElseList)...)
	case *parse.PipeNode:
		for _, command := range node.Cmds {
			for _, argument := range command.Args {
				found = append(found, names(argument)...)
			}
		}
	case *parse.FieldNode:
		return node.Ident
	case *parse.VariableNode:
		return node.Ident
	}
	return found
}

func namesMessages(parsed *template.Template) bool {
	for _, each := range parsed.Templates() {
		for _, name := range names(each.Root) {
			if strings.EqualFold(name, "messages") {
				return true
			}
		}
	}
	return false
}

func render(parsed *template.Template, messages []message) result {
	system, together := joined(messages)
	var written bytes.Buffer
	err := parsed.Execute(&written, map[string]any{
		"System": system, "Messages": together, "Tools": nil, "Response": "", "Think": false, "ThinkLevel": "", "IsThinkSet": false,
	})
	if err != nil {
		return result{Error: err.Error()}
	}
	return result{Text: written.String()}
}

func run(in io.Reader, out io.Writer) error {
	var asked request
	if err := json.NewDecoder(in).Decode(&asked); err != nil {
		return err
	}
	parsed, err := template.New("").Option("missingkey=zero").Funcs(functions).Parse(asked.Template)
	if err != nil {
		return err
	}
	if !namesMessages(parsed) {
		return fmt.Errorf("the template does not name .Messages")
	}
	results := []result{}
	for _, messages := range asked.Conversations {
		results = append(results, render(parsed, messages))
	}
	encoder := json.NewEncoder(out)
	encoder.SetEscapeHTML(false)
	return encoder.Encode(results)
}

func main() {
	if err := run(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
